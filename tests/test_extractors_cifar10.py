"""The CIFAR-10 split, and whether FID in its extractor's features orders what it should."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distances import fid
from PIL import Image
from torch.nn import functional

from study.cifar10 import DEFAULT_ROOT
from study.data import planes, to_float, to_uint8
from study.extractors import splits, train
from study.extractors.load import EXTRACTORS, Extractor, load

Split = dict[str, tuple[np.ndarray, np.ndarray]]
NAME, MANY = "cifar10-cnn", 2000
there = pytest.mark.skipif(
    not DEFAULT_ROOT.is_dir(), reason=f"no CIFAR-10, as archive or as images, in {DEFAULT_ROOT}"
)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load(NAME)


@pytest.fixture(scope="module")
def split() -> Split:
    return splits.of_cifar10_or_folder(DEFAULT_ROOT)


def features(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([extractor(part) for part in images.split(100)])


@pytest.fixture(scope="module")
def seen(extractor: Extractor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all held-out and of MANY training images, those not in order of class."""
    rows = np.random.default_rng(0).permutation(len(split["train"][1]))[:MANY]
    return (
        features(extractor, planes(split["held_out"][0])),
        features(extractor, planes(split["train"][0][rows])),
    )


def some(split: Split, n: int) -> np.ndarray:
    """Rows of n held-out images at random, a folder's being in order of class."""
    return np.random.default_rng(1).permutation(len(split["held_out"][1]))[:n]


def test_the_split_is_the_one_the_weights_were_trained_on() -> None:
    """A changed split would let the extractor see images it is used to judge. By place in its
    class, whatever the order of classes: of an archive, mixed, or of a folder, one by one."""
    for labels in (np.arange(10_000) % 10, np.sort(np.arange(10_000) % 10)):
        place = np.zeros(10_000, np.uint16)
        for c in range(10):
            place[labels == c] = np.arange(1000)
        parts = splits._halved({"train": (place, labels), "test": (place, labels)})
        assert len(parts["train"][1]) == 10_000
        assert [len(parts[p][1]) for p in ("held_out", "extractor")] == [5000, 5000]
        own, digest = parts["extractor"], hashlib.sha256()
        for c in range(10):
            assert len(both := own[0][own[1] == c]) == 500
            held = parts["held_out"][0][parts["held_out"][1] == c]
            assert sorted([*both, *held]) == list(range(1000))
            digest.update(both.tobytes())
        assert digest.hexdigest()[:16] == "587297efd5737552"


@there
def test_accuracy_on_unseen_photographs_by_features_that_are_not_ten_points(
    extractor: Extractor, split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    labels, f = split["held_out"][1], seen[0].double().numpy()
    assert np.mean(extractor.network.head(seen[0]).argmax(1).numpy() == labels) > 0.63
    spectrum = np.linalg.eigvalsh(np.cov(f, rowvar=False))
    share = spectrum / spectrum.sum()
    assert np.exp(-(share * np.log(share)).sum()) > 12  # effective rank, of 64
    within = np.mean([np.trace(np.cov(f[labels == c], rowvar=False)) for c in range(10)])
    assert within / spectrum.sum() > 0.3


@there
def test_fid_rises_with_noise_blur_tint_and_ghosts(
    extractor: Extractor, split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    rows = some(split, MANY)
    floor = fid(seen[0][rows], seen[1])
    x = to_float(planes(split["held_out"][0][rows]))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(x.shape, generator=generator)
    smooth = functional.avg_pool2d(x, 3, 1, 1)
    first, second = torch.randint(MANY, (2, MANY), generator=generator)
    ghosts, place = (x[first] + x[second]) / 2, torch.rand(MANY, 1, 1, 1, generator=generator)
    tint = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    changed = {
        "noise": [x + s * z for s in (0.05, 0.1, 0.2)],
        "blur": [torch.lerp(x, smooth, s) for s in (0.25, 0.5, 1.0)],
        "tint": [x + s * tint for s in (0.1, 0.2)],
        "ghosts": [torch.where(place < s, ghosts, x) for s in (0.25, 1.0)],
    }
    for name, levels in changed.items():
        found = [fid(features(extractor, to_uint8(level)), seen[1]) for level in levels]
        rising = [floor, *found]
        assert all(low < high for low, high in zip(rising, rising[1:], strict=False)), name
        assert rising[-1] > 3 * floor, name


@there
def test_fid_rises_without_any_one_class(
    split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    labels, (held_out, reference) = split["held_out"][1], seen
    lost = [fid(held_out[torch.from_numpy(labels != c)], reference) for c in range(10)]
    assert min(lost) > 1.1 * fid(held_out, reference)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of random images, train/CLASS and test/CLASS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(80):
        path = tmp_path / "copy" / ("train" if i < 20 else "test") / "abcdefghij"[i % 10]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path / f"{i}.png")
    return tmp_path / "copy"


def test_training_command_reads_a_folder_and_writes_the_same_bytes_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train.RECIPES, "cifar10", train.RECIPES["cifar10"]._replace(steps=3))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(train, "FOLDER", tmp_path / "out")
    written = []
    for _ in range(2):
        assert train.main(["cifar10", "--root", str(copy)]) == 0
        written.append((tmp_path / "out" / f"{NAME}.pt").read_bytes())
    assert written[0] == written[1] and len(list((tmp_path / "out").iterdir())) == 1
    told = capsys.readouterr().out
    assert "held_out: accuracy" in told and "of 30" in told and "of 20" in told
    network = train.SmallCNN(EXTRACTORS[NAME])
    network.load_state_dict(torch.load(tmp_path / "out" / f"{NAME}.pt", weights_only=True))


def test_training_command_tells_what_is_wrong(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "test" / "c")
    assert train.main(["cifar10", "--root", str(copy)]) == 2
    assert f"{copy}: train and test have other classes" in capsys.readouterr().err
    shutil.rmtree(copy / "test")
    assert train.main(["cifar10", "--root", str(copy)]) == 2
    assert str(copy) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["digits", "--root", str(copy)])
    assert "digits come with scikit-learn" in capsys.readouterr().err
