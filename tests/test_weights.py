"""Power-function averages against the profile they promise, and files that break."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from studies import trained

from study.errors import StudyError
from study.store import Folder, sha256, write_json
from study.weights import (
    average,
    digest,
    load_tensors,
    power_gamma,
    save_tensors,
    snapshot_name,
    weights_at,
)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_gamma_of_the_published_lengths(length: float, gamma: float) -> None:
    assert power_gamma(length) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_profile_has_the_stated_width(length: float) -> None:
    """Weights (n, n^2) at update n: their averages are the profile's first two moments."""
    T, gamma = 4000, power_gamma(length)
    averages = [[torch.full((2,), 1e9, dtype=torch.float64)]]
    for n in range(1, T + 1):
        average(averages, [torch.tensor([n, n * n], dtype=torch.float64)], [gamma], n)
    first, second = averages[0][0].tolist()
    assert (second - first**2) ** 0.5 / T == pytest.approx(length, rel=2e-3)
    assert first / T == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / T)  # mean of t^gamma


def test_averages_do_not_mix() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    averages = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    average(averages, weights, [6.94, 16.97], 1)
    for kept in averages:
        assert all(torch.equal(a, w) for a, w in zip(kept, weights, strict=True))
    average(averages, [2 * w for w in weights], [0.0, 1.0], 2)  # beta = 1/2 and 1/4
    assert averages[0][0].tolist() == pytest.approx([1.5, 3.0])
    assert averages[1][0].tolist() == pytest.approx([1.75, 3.5])
    assert averages[1][1].tolist() == [[pytest.approx(5.25)]]
    assert weights[0].tolist() == [1.0, 2.0]


def test_files_round_trip(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.file("snapshots").mkdir()
    emas = {"0.05": {"w": torch.randn(3)}, "0.1": {"w": torch.randn(3)}}
    path = folder.file(snapshot_name(0.25))
    save_tensors(path, {"raw": {"w": torch.zeros(3)}, "ema": emas})
    digests = {snapshot_name(0.25): sha256(path)}
    write_json(folder.file("trained.json"), trained("0123456789", sha256=digests))
    assert torch.equal(weights_at(folder, 0.25, 0.1)["w"], emas["0.1"]["w"])
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["0.250.pt"]
    emas["0.1"]["w"] += 1
    save_tensors(path, {"raw": {"w": torch.zeros(3)}, "ema": emas})
    with pytest.raises(StudyError, match="SHA-256 has changed"):
        weights_at(folder, 0.25, 0.1)
    path.unlink()
    with pytest.raises(StudyError, match="gone"):
        weights_at(folder, 0.25, 0.1)


def test_broken_files_are_user_errors(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    with pytest.raises(StudyError, match="weights.pt"):
        load_tensors(file)  # missing
    save_tensors(file, {"w": torch.randn(1000)})
    whole = file.read_bytes()
    pieces = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for torn in (*pieces, b"not weights at all", pickle.dumps({"w": 1}, 2)[:-3]):
        file.write_bytes(torn)
        with pytest.raises(StudyError, match="weights.pt"):
            load_tensors(file)


class Code:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    file, mark = tmp_path / "weights.pt", tmp_path / "ran"
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists()  # the trap works ...
    mark.unlink()
    for write in (lambda: torch.save(Code(mark), file),
                  lambda: file.write_bytes(pickle.dumps(Code(mark), 2))):  # fmt: skip
        write()
        with pytest.raises(StudyError):
            load_tensors(file)
    assert not mark.exists()  # ... and is not sprung


def refusals() -> dict[str, tuple[bytes, str]]:
    """Files that torch does not read, each with what is said of it."""
    file, script, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"net": torch.nn.Linear(2, 2)}, file)
    with zipfile.ZipFile(script, "w") as members:  # what torch knows TorchScript by
        for name in ("version", "constants.pkl", "data.pkl"):
            members.writestr(f"net/{name}", "3\n")
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("notes.txt", "text")
    none = "it is no file of weights"
    return {
        "code": (pickle.dumps(Code(Path("ran")), 2), "it asks for getattr, which is not executed"),
        "a module": (file.getvalue(), "it asks for torch.nn.modules.linear.Linear, which is not "
                                      "executed"),
        "a script": (script.getvalue(), none),
        "a torn file": (file.getvalue()[:900], "PytorchStreamReader failed reading zip archive: "
                                               "failed finding central directory"),
        "a zip archive": (archive.getvalue(), none),
        "an empty zip archive": (archive.getvalue()[-22:-14] + bytes(14), none),
        "text": (b"<html>404</html>", none),
        "a pickle": (pickle.dumps({"w": 1}, 4), none),
        "nothing": (b"", "EOFError()"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", refusals())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_not_read_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    """And no word of how to have the file executed."""
    (tmp_path / "net.pt").write_bytes(refusals()[kind][0])
    with pytest.raises(StudyError) as caught:
        load_tensors(tmp_path / "net.pt")
    told = f"{tmp_path}/net.pt: cannot be read as weights: {refusals()[kind][1]}"
    assert str(caught.value) == told


def test_digest_is_of_names_and_values() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    one = digest({"a": a, "b": b})
    assert one == digest({"b": b.clone().requires_grad_(), "a": a})
    last = torch.randn(2, 3, 4, 4)
    assert digest({"a": last}) == digest({"a": last.to(memory_format=torch.channels_last)})
    assert len({one, digest({"a": a, "c": b}), digest({"a": a + 1e-6, "b": b}), digest({})}) == 4
