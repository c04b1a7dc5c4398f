"""The shipped extractors, the digits split, and whether FID in the features of digits orders what
it should."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from distances import fid
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from study.extractors import splits
from study.extractors.load import EXTRACTORS, Extractor, load
from study.extractors.names import FOLDER, extractor_identity, shipped
from study.extractors.train import RECIPES, train, write

SPLIT = splits.of_digits()


def as_uint8(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.clip(np.round(images), 0, 255).astype(np.uint8))[:, None]


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load("digits-cnn")


def test_split_is_a_stratified_partition_of_all_digits() -> None:
    assert {name: len(labels) for name, (_, labels) in SPLIT.items()} == {
        "train": 997, "held_out": 400, "extractor": 400,
    }
    original = load_digits()
    rows = [
        (label, image.tobytes())
        for images, labels in SPLIT.values()
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    expected = [
        (label, bytes(int(v * 255 / 16 + 0.5) for v in image.ravel()))
        for image, label in zip(original.images, original.target.tolist(), strict=True)
    ]
    assert sorted(rows) == sorted(expected)  # every image once, in exactly one part
    total = np.bincount(original.target)
    for images, labels in SPLIT.values():
        assert images.dtype == labels.dtype == np.uint8 and images.shape[1:] == (8, 8)
        share = total * len(labels) / 1797
        assert np.abs(np.bincount(labels) - share).max() < 1.5
        assert len(np.unique(labels[:100])) == 10  # in random order, not class by class


def test_split_is_the_one_the_shipped_weights_were_trained_on() -> None:
    """A changed split would let the extractor see images it is used to judge."""
    digest = hashlib.sha256()
    for name in ("train", "held_out", "extractor"):
        digest.update(SPLIT[name][0].tobytes() + SPLIT[name][1].tobytes())
    assert digest.hexdigest()[:16] == "b891685b63a557d8"
    again = splits.of_digits()
    assert all(np.array_equal(again[name][0], SPLIT[name][0]) for name in SPLIT)


@pytest.mark.parametrize(("name", "digest", "features", "size"), [
    ("digits-cnn", "cf288f85", 32, 200_000), ("fashion_mnist-cnn", "f0792c2e", 64, 2_000_000),
    ("cifar10-cnn", "b891c548", 64, 700_000),
])  # fmt: skip
def test_features_and_digest(name: str, digest: str, features: int, size: int) -> None:
    extractor, generator = load(name), torch.Generator().manual_seed(0)
    shape = 20, *EXTRACTORS[name].image
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    found = extractor(images)
    assert found.shape == (20, features) and found.dtype == torch.float32
    assert not found.requires_grad
    assert not any(module.training for module in extractor.modules())
    assert extractor.classes(images).shape == (20, 10)
    torch.testing.assert_close(extractor(images[:7]), found[:7])
    if shape[1] == 3:  # colours are told apart
        assert (extractor(images.flip(1)) - found).abs().max() > 0.1
    content = (FOLDER / f"{name}.pt").read_bytes()
    assert hashlib.sha256(content).hexdigest()[:8] == digest and len(content) < size
    assert extractor.name == name and extractor_identity(name) == f"{name}:{digest}"
    assert sorted(EXTRACTORS) == shipped()


@pytest.mark.parametrize("part", ["held_out", "train"])
def test_accuracy_on_unseen_digits(extractor: Extractor, part: str) -> None:
    images, labels = SPLIT[part]
    found = extractor.classes(as_uint8(images)).argmax(1).numpy()
    assert np.mean(found == labels) > 0.95


def test_features_are_not_ten_points(extractor: Extractor) -> None:
    images, labels = SPLIT["train"]
    features = extractor(as_uint8(images)).double().numpy()
    total = np.trace(np.cov(features, rowvar=False))
    within = np.mean([np.trace(np.cov(features[labels == c], rowvar=False)) for c in range(10)])
    assert within / total > 0.2
    spectrum = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    assert spectrum[0] > 0.003 * spectrum[-1]  # every feature carries something of its own


def test_fid_rises_with_noise_and_with_blur(extractor: Extractor) -> None:
    order = np.random.RandomState(0).permutation(997)
    first, second = (SPLIT["train"][0][rows].astype(float) for rows in (order[:498], order[498:]))
    reference = extractor(as_uint8(second))
    z = np.random.RandomState(1).standard_normal(first.shape)
    floor = fid(extractor(as_uint8(first)), reference)
    noise = [fid(extractor(as_uint8(first + s * z)), reference) for s in (8, 16, 32, 64, 128)]
    blur = [
        fid(extractor(as_uint8(gaussian_filter(first, (0, s, s)))), reference)
        for s in (0.4, 0.5, 0.7, 1.0, 2.0)
    ]
    for rising in ([floor, *noise], [floor, *blur]):
        assert all(low < high for low, high in zip(rising, rising[1:], strict=False)), rising
    assert noise[-1] > 10 * floor and blur[-1] > 100 * floor
    lost = SPLIT["train"][1][order[:498]] != 3
    assert fid(extractor(as_uint8(first[lost])), reference) > 2 * floor


@pytest.mark.parametrize("name", EXTRACTORS)
def test_other_images_are_refused(name: str) -> None:
    extractor, (channels, side, _) = load(name), EXTRACTORS[name].image
    for images in (
        torch.zeros(2, channels, side, side),
        torch.zeros(2, side, side, channels, dtype=torch.uint8),
        torch.zeros(2, 4 - channels, side, side, dtype=torch.uint8),
        torch.zeros(2, channels, 16, 16, dtype=torch.uint8),
    ):
        told = rf"takes uint8 images \(B, {channels}, {side}, {side}\), got"
        with pytest.raises(ValueError, match=told):
            extractor(images)


def test_training_again_writes_the_same_bytes(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for name in ("first.pt", "second.pt"):
        recipe = RECIPES["digits"]._replace(steps=20)
        network = train(*SPLIT["extractor"], EXTRACTORS["digits-cnn"], recipe)
        write(network, tmp_path / name)
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    network.load_state_dict(torch.load(tmp_path / "first.pt", weights_only=True))


def test_training_learns() -> None:
    """A tenth of the shipped training already reads most unseen digits."""
    recipe = RECIPES["digits"]._replace(steps=200)
    network = train(*SPLIT["extractor"], EXTRACTORS["digits-cnn"], recipe)
    images, labels = SPLIT["held_out"]
    with torch.no_grad():
        logits = network.head(network(as_uint8(images).float() / 127.5 - 1))
    assert np.mean(logits.argmax(1).numpy() == labels) > 0.8
