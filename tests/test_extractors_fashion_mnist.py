"""The Fashion-MNIST split, and whether FID in its extractor's features orders what it should."""

import hashlib
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distances import fid
from torch.nn import functional

from study import data
from study.data import to_float, to_uint8
from study.errors import StudyError
from study.extractors import splits, train
from study.extractors.load import EXTRACTORS, Extractor, load
from study.fashion_mnist import DEBIAN, FILES
from study.subjects import FashionMnist

Split = dict[str, tuple[np.ndarray, np.ndarray]]
NAME = "fashion_mnist-cnn"
SIZES = {"train": 50_000, "held_out": 10_000, "extractor": 10_000}
CLASSES = (60, 24, 6, 18, 12)  # training images of each class of the made files
MANY = 4000
installed = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


def idx(array: np.ndarray) -> bytes:
    """An IDX file's bytes, from the format's description."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's own files: random images of unequal classes."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), CLASSES)).astype(np.uint8)
    arrays = {
        "train_images": rng.integers(0, 256, (len(labels), 28, 28), np.uint8),
        "train_labels": labels,
        "test_images": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "test_labels": rng.integers(0, len(CLASSES), 30, np.uint8),
    }
    for key, array in arrays.items():
        (root / FILES[key].name.removesuffix(".gz")).write_bytes(idx(array))
    return root


@pytest.fixture(scope="module")
def split() -> Split:
    return splits.of_fashion_mnist(DEBIAN)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load(NAME)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images)[:, None]


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_split_of_made_files_is_a_stratified_partition(made: Path) -> None:
    parts = splits.of_fashion_mnist(made)
    counts = {name: np.bincount(labels).tolist() for name, (_, labels) in parts.items()}
    assert counts["extractor"] == [n // 6 for n in CLASSES]
    assert counts["train"] == [n - n // 6 for n in CLASSES]
    content = (made / FILES["train_images"].name.removesuffix(".gz")).read_bytes()[16:]
    images = np.frombuffer(content, np.uint8).reshape(-1, 28, 28)
    train, own = (rows(parts[name][0]) for name in ("train", "extractor"))
    assert sorted(train + own) == sorted(rows(images))  # every image once, in exactly one part
    for part in (train, own):  # and in the order of the file
        assert [row for row in rows(images) if row in set(part)] == part
    labels = (made / FILES["train_labels"].name.removesuffix(".gz")).read_bytes()[8:]
    of = dict(zip(rows(images), labels, strict=True))
    assert all([of[row] for row in rows(x)] == y.tolist() for x, y in
               (parts["train"], parts["extractor"]))  # fmt: skip


def test_a_study_trains_on_the_splits_train_part(made: Path) -> None:
    parts, loaded = splits.of_fashion_mnist(made), data.load(FashionMnist(root=str(made)))
    assert torch.equal(loaded.train, as_tensor(parts["train"][0]))
    assert torch.equal(loaded.held_out, as_tensor(parts["held_out"][0]))
    assert loaded.train.shape == (100, 1, 28, 28)


def test_a_torn_file_is_refused(made: Path, tmp_path: Path) -> None:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1])
    for read in (splits.of_fashion_mnist, lambda root: data.load(FashionMnist(root=str(root)))):
        with pytest.raises(StudyError, match="train-images.*the header says"):
            read(tmp_path)


@installed
def test_split_of_the_published_files_is_the_one_the_weights_were_trained_on(split: Split) -> None:
    """A changed split would let the extractor see images it is used to judge."""
    assert {name: len(labels) for name, (_, labels) in split.items()} == SIZES
    digest = hashlib.sha256()
    for name, (images, labels) in split.items():
        assert images.dtype == labels.dtype == np.uint8 and images.shape[1:] == (28, 28)
        assert np.bincount(labels).tolist() == [SIZES[name] // 10] * 10
        digest.update(images.tobytes() + labels.tobytes())
    assert digest.hexdigest()[:16] == "eb7785cb0efb1afb"


@pytest.fixture(scope="module")
def seen(extractor: Extractor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of held-out and of training images, MANY each."""
    first, second = (as_tensor(split[part][0][:MANY]) for part in ("held_out", "train"))
    return features(extractor, first), features(extractor, second)


def features(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
    """By 128 images, several times as fast on a CPU as all at once."""
    return torch.cat([extractor(part) for part in images.split(128)])


@installed
def test_accuracy_on_unseen_garments_by_features_that_are_not_ten_points(
    extractor: Extractor, split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    labels, f = split["held_out"][1][:MANY], seen[0].double().numpy()
    assert np.mean(extractor.network.head(seen[0]).argmax(1).numpy() == labels) > 0.85
    spectrum = np.linalg.eigvalsh(np.cov(f, rowvar=False))
    share = spectrum / spectrum.sum()
    assert np.exp(-(share * np.log(share)).sum()) > 12  # effective rank, of 64
    within = np.mean([np.trace(np.cov(f[labels == c], rowvar=False)) for c in range(10)])
    assert within / spectrum.sum() > 0.3


@installed
def test_fid_rises_with_noise_blur_and_ghosts(
    extractor: Extractor, split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    n = 1500
    held_out, reference = seen
    floor = fid(held_out[:n], reference)
    x = to_float(as_tensor(split["held_out"][0][:n]))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(x.shape, generator=generator)
    smooth = functional.avg_pool2d(x + 1, 3, 1, 1) - 1
    first, second = torch.randint(n, (2, n), generator=generator)
    ghosts, place = (x[first] + x[second]) / 2, torch.rand(n, 1, 1, 1, generator=generator)
    changed = {
        "noise": [x + s * z for s in (0.05, 0.1, 0.2)],
        "blur": [torch.lerp(x, smooth, s) for s in (0.25, 0.5, 1.0)],
        "ghosts": [torch.where(place < s, ghosts, x) for s in (0.05, 0.25)],
    }
    for name, levels in changed.items():
        found = [fid(features(extractor, to_uint8(level)), reference) for level in levels]
        rising = [floor, *found]
        assert all(low < high for low, high in zip(rising, rising[1:], strict=False)), name
        assert rising[-1] > 5 * floor, name


@installed
def test_fid_rises_without_any_one_class(
    split: Split, seen: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """With MANY images: the floor is FID's bias, some 1/n, and would cover this with few."""
    labels, (held_out, reference) = split["held_out"][1][:MANY], seen
    lost = [fid(held_out[torch.from_numpy(labels != c)], reference) for c in range(10)]
    assert min(lost) > 2 * fid(held_out, reference)


def test_training_command_writes_the_same_bytes_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = train.RECIPES["fashion_mnist"]._replace(
        split=partial(splits.of_fashion_mnist, made), steps=3
    )
    monkeypatch.setitem(train.RECIPES, "fashion_mnist", recipe)
    monkeypatch.setattr(train, "FOLDER", tmp_path)
    written = []
    for _ in range(2):
        assert train.main(["fashion_mnist"]) == 0
        written.append((tmp_path / f"{NAME}.pt").read_bytes())
    assert written[0] == written[1] and len(list(tmp_path.iterdir())) == 1
    assert "train: accuracy" in capsys.readouterr().out
    network = train.SmallCNN(EXTRACTORS[NAME])
    network.load_state_dict(torch.load(tmp_path / f"{NAME}.pt", weights_only=True))


def test_training_command_tells_what_is_wrong_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"torn")
    torn = partial(splits.of_fashion_mnist, tmp_path)
    recipe = train.RECIPES["fashion_mnist"]._replace(split=torn)
    monkeypatch.setitem(train.RECIPES, "fashion_mnist", recipe)
    monkeypatch.setattr(train, "FOLDER", tmp_path / "none")
    assert train.main(["fashion_mnist"]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
