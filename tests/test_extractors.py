"""The digits split, and whether FID in the shipped extractor's features orders what it should."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from distances import fid
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from study.errors import StudyError
from study.extractors import digits
from study.extractors.load import EXTRACTORS, FOLDER, Extractor, load
from study.extractors.train import RECIPES, train, write

SPLIT = digits.split()


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
    again = digits.split()
    assert all(np.array_equal(again[name][0], SPLIT[name][0]) for name in SPLIT)


def test_features_and_digest(extractor: Extractor) -> None:
    images = as_uint8(SPLIT["held_out"][0])
    features = extractor(images)
    assert features.shape == (400, 32) and features.dtype == torch.float32
    assert not features.requires_grad
    assert not any(module.training for module in extractor.modules())
    assert extractor.classes(images).shape == (400, 10)
    torch.testing.assert_close(extractor(images[:7]), features[:7])
    content = (Path(FOLDER) / "digits-cnn.pt").read_bytes()
    assert extractor.digest == hashlib.sha256(content).hexdigest()[:8]
    assert extractor.name == "digits-cnn" and len(content) < 200_000


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


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(extractor: Extractor, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes uint8 images \(B, 1, 8, 8\), got"):
        extractor(images)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(StudyError, match="'digits_cnn' is not known; allowed: digits-cnn"):
        load("digits_cnn")


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
