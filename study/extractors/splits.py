"""The three-way split of each data set that an extractor ships for, defined once.

The extractor that measures a study must not have seen the images that the study trains on or
compares with, so it has images of its own ("extractor"), others are held out from everything
("held_out"), and the rest remains to train on ("train"). Which image is in which part is fixed: by
permutations from RandomState, whose stream numpy has frozen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from study import cifar10, fashion_mnist, folder
from study.errors import StudyError

DIGITS_SEED, FASHION_SEED, CIFAR_SEED = 20240229, 20240301, 20240305
DIGITS_SIZES = {"extractor": 400, "held_out": 400}  # the rest is "train"
EVERY = 6  # of Fashion-MNIST's training images, sorted by class, every 6th is the extractor's

Split = dict[str, tuple[np.ndarray, np.ndarray]]  # images and labels by part


def of_digits() -> Split:
    """scikit-learn's 8 x 8 handwritten digits: 997 to train on, 400 held out, 400 the extractor's.

    1 797 grey images of ten classes (Alpaydin and Kaynak's optical digits, UCI). Images are
    (n, 8, 8) uint8 in 0..255, pixel v of 0..16 as round(255 v / 16); labels (n,) uint8. Sorted by
    class, every k-th image goes to the smaller part, so each part holds its share of each class to
    within one image.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    left = np.random.RandomState(DIGITS_SEED).permutation(len(labels))
    parts = {}
    for name, size in DIGITS_SIZES.items():
        rank = np.argsort(np.argsort(labels[left], kind="stable"))  # place when sorted by class
        chosen = (rank + 1) * size // len(left) > rank * size // len(left)
        parts[name] = (images[left[chosen]], labels[left[chosen]])
        left = left[~chosen]
    return {"train": (images[left], labels[left]), **parts}


def of_fashion_mnist(root: Path | None = None) -> Split:
    """Fashion-MNIST: of the 60 000 training images 50 000 to train on and 10 000, 1 000 of each
    class, the extractor's; the 10 000 test images held out.

    Images are (n, 28, 28) uint8 in 0..255, labels (n,) uint8, each part in the order of its file.
    root: as for study.fashion_mnist.load, which raises StudyError for missing or broken files; of
    a user's own files too every sixth training image is left to the extractor.
    """
    arrays = fashion_mnist.load(root)
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.random.RandomState(FASHION_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within each
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[EVERY - 1 :: EVERY]] = True
    return {
        "train": (images[~chosen], labels[~chosen]),
        "held_out": (arrays["test_images"], arrays["test_labels"]),
        "extractor": (images[chosen], labels[chosen]),
    }


def of_cifar10(root: Path | None = None) -> Split:
    """CIFAR-10: all 50 000 training images to train on, as the published models do and as the
    published FID's reference is; of the 10 000 test images half, 500 of each class, the
    extractor's, and half held out: FID's bias falls with the images that are held out and the
    extractor's accuracy grows with its own.

    Images are (n, 32, 32, 3) uint8 in 0..255, labels (n,) int64, each part in the order of its
    files. root: as for study.cifar10.load, which raises StudyError for missing or broken files.

    The shipped weights were trained on a copy of these images recompressed as JPEG at about
    quality 75, a folder of train/CLASS and test/CLASS: on its half of the test images, whose
    classes they tell in 97.7 of 100 cases, and of the images they have not seen in 66.6 (held out)
    and 66.9 (training). Which half an image is in depends on its class and on its place among the
    images of its class alone, so that the copy, whose files are in the archive's order as far as
    that was looked at (the first ten of each part), and the archive are cut alike. Where a folder
    of all 10 000 test images is a study's held-out part, half of it are the extractor's own: read
    FID against the training images.
    """
    return _halved(cifar10.load(root))


def of_cifar10_or_folder(root: Path | None = None) -> Split:
    """The same, where root may also be a folder (or zip) of images, train/CLASS and test/CLASS.
    Raises StudyError where the two have not the same classes."""
    if root is None or cifar10.find(root):
        return of_cifar10(root)
    images, paths = zip(*folder.load(root, None).values(), strict=True)
    names = [[Path(path).parent.name for path in part] for part in paths]
    (known, train), (others, test) = (np.unique(part, return_inverse=True) for part in names)
    if not np.array_equal(known, others):
        raise StudyError(f"{root}: train and test have other classes; allowed: train/CLASS and "
                         "test/CLASS, of the same classes")  # fmt: skip
    return _halved({"train": (images[0], train), "test": (images[1], test)})


def _halved(parts: Split) -> Split:
    """Of the test images of each class a fixed half, chosen by place, goes to the extractor."""
    images, labels = parts["test"]
    chosen = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        order = np.random.RandomState(CIFAR_SEED + int(c)).permutation(len(rows))
        chosen[rows[order[: len(rows) // 2]]] = True
    return {
        "train": parts["train"],
        "held_out": (images[~chosen], labels[~chosen]),
        "extractor": (images[chosen], labels[chosen]),
    }
