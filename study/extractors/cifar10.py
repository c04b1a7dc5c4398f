"""The three-way split of CIFAR-10, defined once.

The extractor that measures a study must not have seen the images that the study trains on or
compares with. Students train on all 50 000 training images, as the published models do and as the
published FID's reference is, so it has half of the 10 000 test images, 500 of each class, and the
other half is held out from everything: halves, because FID's bias falls with the images that are
held out and the extractor's accuracy grows with its own.

The shipped weights were trained on a copy of these images recompressed as JPEG at about quality
75, a folder of train/CLASS and test/CLASS: on its half of the test images, whose classes they tell
in 97.7 of 100 cases, and of the images they have not seen in 66.6 (held out) and 66.9 (training).
Which half an image is in depends on its class and on its place among the images of its class
alone, so that the copy, whose files are in the archive's order as far as that was looked at (the
first ten of each part), and the archive are cut alike. Where a folder of all 10 000 test images is
a study's held-out part, half of it are the extractor's own: read FID against the training images.
"""

from pathlib import Path

import numpy as np

from study import cifar10, folder
from study.errors import StudyError

SEED = 20240305

Split = dict[str, tuple[np.ndarray, np.ndarray]]


def split(root: Path | None = None) -> Split:
    """Return (images, labels) of train (50 000), held_out (5 000) and extractor (5 000).

    Images are (n, 32, 32, 3) uint8 in 0..255, labels (n,) int64, each part in the order of its
    files. root: as for study.cifar10.load, which raises StudyError for missing or broken files.
    """
    return _halved(cifar10.load(root))


def split_any(root: Path | None = None) -> Split:
    """The same, where root may also be a folder (or zip) of images, train/CLASS and test/CLASS.
    Raises StudyError where the two have not the same classes."""
    if root is None or cifar10.find(root):
        return split(root)
    images, paths = zip(*folder.load(root, None).values(), strict=True)
    names = [[Path(path).parent.name for path in part] for part in paths]
    (known, train), (others, test) = (np.unique(part, return_inverse=True) for part in names)
    if not np.array_equal(known, others):
        raise StudyError(f"{root}: train and test have other classes; allowed: train/CLASS and "
                         "test/CLASS, of the same classes")  # fmt: skip
    return _halved({"train": (images[0], train), "test": (images[1], test)})


def _halved(parts: Split) -> Split:
    """Of the test images of each class a fixed half, chosen by place, goes to the extractor. The
    permutation is from RandomState, whose stream numpy has frozen."""
    images, labels = parts["test"]
    chosen = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        order = np.random.RandomState(SEED + int(c)).permutation(len(rows))
        chosen[rows[order[: len(rows) // 2]]] = True
    return {
        "train": parts["train"],
        "held_out": (images[~chosen], labels[~chosen]),
        "extractor": (images[chosen], labels[chosen]),
    }
