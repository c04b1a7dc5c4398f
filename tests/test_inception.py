"""FID as papers report it, on InceptionV3 with random weights in a file like the published one."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import subprocess
import sys
import urllib.error
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from distances import fid
from PIL import Image
from studies import TWO_MODES, read, write
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import feature_extractor_inceptionv3 as theirs

from analysis import report
from study import evaluate, measure, reference
from study.data import Dataset
from study.errors import StudyError
from study.extractors import inception
from study.extractors.inception import Inception
from study.extractors.names import INCEPTION, PUBLISHED, extractor_identity
from study.metrics import Coverage, Fid, Kid, Measure
from study.run import main
from study.settings import Settings, settings_of
from study.store import read_json

CPU = torch.device("cpu")
DIGITS = """\
base:
  data: digits
  network: {kind: unet, width: 4, levels: 1}
  budget: {images: 128}
  batch: 32
  discretization: {kind: fixed, N: 4}
variants:
  ct: {score: single_sample}
  again: {score: single_sample, data_stream: 1}
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict by torch-fidelity's names, drawn so that activations keep their scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        shapes = theirs.FeatureExtractorInceptionV3("any", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict()
    for name, x in shapes.items():
        drawn = torch.randn(x.shape, generator=generator)
        if x.ndim > 1:
            state[name] = drawn * math.sqrt(2 / x[0].numel())
        elif name.endswith(("bn.weight", "bn.running_var")):
            state[name] = 1 + 0.2 * drawn.tanh()
        else:
            state[name] = 0.1 * drawn if ".bn." in name and x.ndim else torch.zeros_like(x)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights: Path) -> Inception:
    return inception.load(extractor_identity(INCEPTION, str(weights)), str(weights))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache" / "consistency-gap"


def forget() -> None:
    """As in a new process."""
    for cached in (reference.features, reference.statistics, reference.floor):
        cached.cache_clear()


def images(n: int, seed: int, channels: int = 3, top: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (n, channels, 32, 32), generator=generator, dtype=torch.uint8)


def dataset(train: int, held_out: int, digest: str = "d") -> Dataset:
    x, y = images(train, 0), images(held_out, 1)
    return Dataset(x, y, tuple(x.shape[1:]), 0.5, digest)


# --- the network ---


class Plain(TorchDataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


def test_distances_are_torch_fidelitys(weights: Path, net: Inception) -> None:
    n, a, b = 8, images(8, 2), images(8, 3, top=180)
    with threadpool_limits(1):
        whole = torch_fidelity.calculate_metrics(
            input1=Plain(a), input2=Plain(b), feature_extractor=INCEPTION, cuda=False, cache=False,
            feature_extractor_weights_path=str(weights), fid=True, kid=True, kid_subsets=1,
            kid_subset_size=n, prc=True, prc_neighborhood=3, save_cpu_ram=True, verbose=False,
        )  # fmt: skip
    found = [evaluate.features(x, net) for x in (a, b)]
    assert found[0].shape == (n, 2048) and found[0].dtype == torch.float32
    assert fid(*found) == pytest.approx(whole[evaluate.FID], rel=1e-6)
    assert evaluate.kid(*found) == pytest.approx(whole[evaluate.KID], rel=1e-6)
    near = evaluate.coverage(*found, 3)
    assert (near["precision"], near["recall"]) == (whole["precision"], whole["recall"])
    assert whole[evaluate.FID] > 1e-4


def test_grey_images_of_any_size_are_repeated_to_three_channels(net: Inception) -> None:
    grey = images(2, 4, channels=1)[..., :28, :20]
    found = evaluate.features(grey, net)
    torch.testing.assert_close(found, evaluate.features(grey.repeat(1, 3, 1, 1), net))
    assert (found[0] - found[1]).abs().max() > 0.01 * found.abs().max()


@pytest.mark.parametrize("wrong", [
    torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8).byte(), torch.zeros(2, 8, 8).byte(),
])  # fmt: skip
def test_what_is_no_image_is_refused(net: Inception, wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 images \(B, 1 or 3, H, W\), got"):
        net(wrong)


# --- names and files of weights ---


def test_a_name_holds_the_digest_of_the_weights_and_not_their_place(
    weights: Path, tmp_path: Path
) -> None:
    assert extractor_identity(INCEPTION) == "inception-v3-compat:6726825d"
    assert f"-{PUBLISHED[:8]}.pth" in theirs.URL_INCEPTION_V3
    moved, other = tmp_path / "moved.pth", tmp_path / "other.pth"
    moved.write_bytes(weights.read_bytes())
    other.write_bytes(b"other")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    for path in (weights, moved):
        assert extractor_identity(INCEPTION, str(path)) == f"{INCEPTION}:{digest}"
    assert extractor_identity(INCEPTION, str(other)) != f"{INCEPTION}:{digest}"

    def files(path: Path | None, text: str) -> set[str]:
        key = f", weights: {path}" if path else ""
        asked = f"measure: {{fid: {{extractor: {INCEPTION}, samples: 400{key}}}, kid: {{}}}}"
        runs = read(tmp_path, DIGITS + asked).runs
        assert {m.weights for r in runs for m in r.measures} == {path and str(path)}
        assert all(text in m.record["extractor"] for r in runs for m in r.measures)
        return {m.file for r in runs for m in r.measures}

    assert files(weights, digest) == files(moved, digest)
    assert not files(weights, digest) & files(None, "6726825d")


def test_kid_and_coverage_read_the_fids_weights_or_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"w")
    fid = Fid(extractor=INCEPTION, samples=10, weights=str(tmp_path / "w"), reference=("train",))
    asked = Measure(fid=fid, kid=Kid(), coverage=Coverage(extractor="digits-cnn"), at=(1.0,))
    factors = read(tmp_path, DIGITS).recipes[0].factors
    found = {s.record["kind"]: s for s in settings_of(asked, factors, "student")}
    assert found["kid"].weights == found["fid"].weights == fid.weights
    assert found["kid"].record["reference"] == "train"
    assert found["coverage"].weights is None
    assert found["coverage"].record["extractor"] == extractor_identity("digits-cnn")
    assert not {"weights", "path"} & set(found["fid"].record)


def test_files_of_measurements_that_were_made_before_keep_their_names(tmp_path: Path) -> None:
    fid = "{extractor: digits-cnn, samples: 400, nfe: [1]}"
    text = DIGITS + f"measure: {{at: [1.0], fid: {fid}, kid: {{}}}}"
    found = {m.file for m in read(tmp_path, text).runs[0].measures}
    assert found == {f"1.000-{name}.json" for name in (
        "fid-433173a4", "fid-aea48ffc", "kid-98aac332", "kid-b92991c3")}  # fmt: skip


def test_a_plan_with_published_weights_needs_neither_their_file_nor_torch(tmp_path: Path) -> None:
    asked = f"measure: {{fid: {{extractor: {INCEPTION}, samples: 997, reference: [train]}}}}"
    path = write(tmp_path, DIGITS + asked)
    code = ("import sys; from study.run import main\n"
            f"assert main([{str(path)!r}, '--plan']) == 0\n"
            "assert not {'torch', 'torch_fidelity'} & set(sys.modules)")  # fmt: skip
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


class Code:
    """A pickle that makes a folder when it is loaded by a reader that executes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("harm", "told"), [
    (lambda state, _: saved({k: v for k, v in state.items() if k != "fc.bias"}),
     "InceptionV3.*Missing.*fc.bias"),
    (lambda state, _: saved(state | {"fc.bias": torch.zeros(1000)}),
     "InceptionV3.*fc.bias.*1000"),
    (lambda state, _: saved(state | {"more": torch.zeros(1)}), "InceptionV3.*Unexpected.*more"),
    (lambda state, _: saved({"model": dict(state)}), "no state dict"),
    (lambda state, _: saved([*state.values()][:3]), "no state dict"),
    (lambda state, _: saved({1: torch.zeros(1)}), "no state dict"),
    (lambda state, _: saved({"a": torch.zeros(1)})[:-30], "cannot be read as weights"),
    (lambda state, _: b"", "cannot be read as weights"),
    (lambda state, _: b"<html>404</html>", "cannot be read as weights"),
    (lambda state, folder: saved({"fc.bias": Code(folder)}), "cannot be read as weights"),
    (lambda state, folder: pickle.dumps(Code(folder), 2), "cannot be read as weights"),
])  # fmt: skip
def test_wrong_weights_are_refused_and_never_executed(
    weights: Path, tmp_path: Path, harm: Callable[[dict, Path], bytes], told: str
) -> None:
    path, folder = tmp_path / "wrong.pth", tmp_path / "executed"
    path.write_bytes(harm(torch.load(weights, weights_only=True), folder))
    with pytest.raises(StudyError, match=f"wrong.pth.*{told}"):
        inception.load(extractor_identity(INCEPTION, str(path)), str(path))
    assert not folder.exists()
    if b"executed" in path.read_bytes():  # the trap is one
        torch.load(path, weights_only=False) if path.read_bytes()[:2] == b"PK" else pickle.loads(
            path.read_bytes()
        )
        assert folder.exists()


def test_weights_that_changed_since_the_plan_or_went_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"one")
    identity = extractor_identity(INCEPTION, str(path))
    path.write_bytes(b"two")
    with pytest.raises(StudyError, match=f"w.pth.*{identity.partition(':')[2]} expected"):
        inception.load(identity, str(path))
    path.unlink()
    with pytest.raises(StudyError, match="w.pth: cannot be read: No such file"):
        inception.load(identity, str(path))


def test_without_a_network_it_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    identity = extractor_identity(INCEPTION)
    place = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(StudyError, match=f"no route.*{place}.*measure.fid.weights"):
        inception.load(identity)
    assert asked == [(theirs.URL_INCEPTION_V3, PUBLISHED)]
    place.write_bytes(b"not the published file")
    with pytest.raises(StudyError, match="6726825d expected"):
        inception.load(identity)
    assert len(asked) == 1


def test_a_study_is_refused_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"w")
    identity = extractor_identity(INCEPTION, str(tmp_path / "w"))
    data = dataset(20, 10)

    def settings(n: int, **more: str) -> Settings:
        record = {"kind": "fid", "samples": n, "extractor": identity, **more}
        return Settings(1.0, record, weights=str(tmp_path / "w"))

    reference.check([settings(20, reference="train"), settings(20)], data)
    with pytest.raises(StudyError, match=r"20 samples.*10 held_out.*reference: \[train\]"):
        reference.check([settings(20, reference="held_out")], data)
    with pytest.raises(StudyError, match="21 samples.*20 train images"):
        reference.check([settings(21)], data)
    (tmp_path / "w").write_bytes(b"other")
    with pytest.raises(StudyError, match="expected"):
        reference.check([settings(20)], data)


@pytest.mark.parametrize(("measured", "told"), [
    ("fid: {extractor: inception-v3, samples: 9}", "'inception-v3'.*did you mean 'inception-v3-c"),
    ("fid: {extractor: fashion_mnist-cnn, samples: 9}", "not an extractor for digits"),
    ("fid: {extractor: digits-cnn, samples: 9, weights: x}", "fid.weights: 'x' given.*its own"),
    ("fid: {extractor: inception-v3-compat, samples: 9, weights: gone}",
     "fid.weights: gone: cannot be read.*drop the key"),
    ("fid: {extractor: digits-cnn, samples: 9, reference: []}", "fid.reference"),
    ("fid: {extractor: digits-cnn, samples: 9, reference: [test]}", "fid.reference"),
    ("fid: {extractor: digits-cnn, samples: 401}",
     r"fid: 401 samples.*400 images in held_out.*say reference: \[train\]"),
    ("fid: {extractor: digits-cnn, samples: 998, reference: [train]}", "997 images in train"),
    ("fid: {extractor: digits-cnn, samples: 500, reference: [train]}\n  kid: {reference: "
     "[train, held_out]}", "kid: 500 samples"),
    ("fid: {extractor: digits-cnn, samples: 9}\n  coverage: {samples: 998}", "coverage.*997"),
    ("fid: {extractor: digits-cnn, samples: 9}\n  coverage: {neighbours: 9}", "9 neighbours of 9"),
    ("kid: {}", "needs extractor and samples"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path: Path, measured: str, told: str) -> None:
    with pytest.raises(StudyError, match=f"(?s){told}"):
        read(tmp_path, f"{DIGITS}measure:\n  {measured}\n")


def test_vectors_and_a_primary_against_what_is_not_measured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="needs images"):
        read(tmp_path, TWO_MODES + f"  fid: {{extractor: {INCEPTION}, samples: 9}}\n")
    only = "measure: {fid: {extractor: digits-cnn, samples: 500, reference: [train]}}\n"
    primary = "primary: {variant: ct, against: again, metric: fid, reference: %s}\n"
    found = {m.record["reference"] for m in read(tmp_path, DIGITS + only).runs[0].measures}
    assert found == {"train"}
    read(tmp_path, DIGITS + only + primary % "train")
    with pytest.raises(StudyError, match="'held_out' is not measured"):
        read(tmp_path, DIGITS + only + primary % "held_out")


# --- statistics of real images, kept ---


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What features were made of; random ones in place of the network's."""
    calls = []

    def features(data: Dataset, n: int, part: str, net: nn.Module) -> Tensor:
        calls.append((data.digest, n, part, net.digest))
        return torch.randn(n, 2048, generator=torch.Generator().manual_seed(n))

    features.cache_clear = lambda: None
    monkeypatch.setattr(reference, "features", features)
    return calls


def test_statistics_are_made_once_for_weights_data_part_and_n(
    cache: Path, made: list[tuple]
) -> None:
    data = dataset(20, 10)
    kinds = [(data, 10, "train", Inception(nn.Identity(), "one")),
             (data, 10, "train", Inception(nn.Identity(), "two")),
             (data, 10, "held_out", Inception(nn.Identity(), "one")),
             (data, 9, "train", Inception(nn.Identity(), "one")),
             (dataset(20, 10, "other"), 10, "train", Inception(nn.Identity(), "one"))]  # fmt: skip
    first = [reference.statistics(*kind) for kind in kinds]
    assert len(made) == len(set(made)) == len(list(cache.glob("*.npz"))) == 5
    again = [reference.statistics(*kind) for kind in kinds]  # in memory
    assert all(a is b for a, b in zip(first, again, strict=True))
    forget()
    again = [reference.statistics(*kind) for kind in kinds]  # from their files
    assert len(made) == 5
    for a, b in zip(first, again, strict=True):
        assert a["sigma"].dtype == b["sigma"].dtype and a["mu"].dtype == b["mu"].dtype
        assert np.array_equal(a["mu"], b["mu"]) and np.array_equal(a["sigma"], b["sigma"])
    expected = np.cov(torch.randn(10, 2048, generator=torch.Generator().manual_seed(10)).T.numpy())
    np.testing.assert_allclose(again[0]["sigma"], expected, atol=1e-12)


def arrays(**given: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **given)
    return file.getvalue()


@pytest.mark.parametrize("harm", [
    lambda whole: whole[:-9],
    lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    lambda whole: b"",
    lambda whole: arrays(mu=np.zeros(64, np.float32), sigma=np.zeros((64, 64))),
    lambda whole: arrays(mu=np.array([{}]), sigma=np.zeros((64, 64))),  # needs a pickle
])  # fmt: skip
def test_a_torn_file_of_statistics_is_made_again(
    cache: Path, made: list[tuple], harm: Callable[[bytes], bytes]
) -> None:
    data, net = dataset(20, 10), Inception(nn.Identity(), "one")
    first = reference.statistics(data, 10, "train", net)
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    forget()
    assert np.array_equal(reference.statistics(data, 10, "train", net)["sigma"], first["sigma"])
    assert len(made) == 2 and path.read_bytes() == whole


def test_a_floor_needs_as_many_held_out_images(cache: Path, made: list[tuple]) -> None:
    net, data = Inception(nn.Identity(), "one"), dataset(20, 10)
    assert reference.floor("fid", data, 11, net) is None and not made
    assert reference.floor("kid", data, 20, net) is None and not made
    assert reference.floor("kid", data, 10, net) is not None


def test_the_latest_results_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "KEEP", 100)
    calls = []
    get = measure.latest(lambda n, k: calls.append((n, k)) or torch.zeros(n, dtype=torch.uint8))
    for key in ((40, 0), (40, 1), (40, 0), (40, 2), (40, 0), (40, 1)):
        assert len(get(*key)) == key[0]
    assert calls == [(40, 0), (40, 1), (40, 2), (40, 1)]  # (40, 1) was the oldest
    get(500, 0)
    get(500, 0)
    assert calls[-1] == (500, 0) and len(calls) == 5  # alone above the size, and kept


# --- end to end ---


def test_a_study_of_a_folder_of_grey_images(
    weights: Path, cache: Path, tmp_path: Path
) -> None:
    for i, image in enumerate(images(12, 5, channels=1)[:, 0, :8, :8].numpy()):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / f"{i:02}.png")
    text = DIGITS.replace(
        "digits", f"{{kind: images, root: {tmp_path / 'data'}, held_out: 4}}"
    ) + (
        "primary: {variant: ct, against: again, metric: fid, nfe: 1, reference: train}\n"
        f"measure:\n  at: [1.0]\n  fid: {{extractor: {INCEPTION}, samples: 8, weights: {weights},"
        " nfe: [1], draws: 1, reference: [train]}\n  coverage: {}\n"
    )  # fmt: skip
    path, results = write(tmp_path, text), tmp_path / "results"
    assert main([str(path), "--results", str(results), "--workers", "0"]) == 0
    files = sorted((results / "small/runs").glob("*/measures/*.json"))
    found = [read_json(file) for file in files]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    assert {f["settings"]["extractor"] for f in found} == {f"{INCEPTION}:{digest}"}
    fids = [f for f in found if f["settings"]["kind"] == "fid"]
    assert len(fids) == 2 and all(f["value"] > 0 and f["floor"] is None for f in fids)
    near = [f for f in found if f["settings"]["kind"] == "coverage"]
    assert len(near) == 2 and all("recall" in f and "shares" not in f for f in near)
    assert str(weights) not in json.dumps(found)
    assert len(list(cache.glob("statistics-*.npz"))) == 1  # for both runs
    told = Path(report.build(results / "small")).with_name("report.md").read_text()
    assert "No floor: fewer images are held out than are compared." in told
    assert "recall" in told and "class_tv" not in told
