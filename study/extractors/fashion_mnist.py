"""The three-way split of Fashion-MNIST, defined once.

The extractor that measures a study must not have seen the images that the study trains on or
compares with, so of the 60 000 training images it has 10 000 of its own, 1 000 of each class;
50 000 remain to train on, and the 10 000 test images are held out from everything.
"""

from pathlib import Path

import numpy as np

from study.fashion_mnist import load

SEED = 20240301
EVERY = 6  # of the training images, sorted by class, every 6th is the extractor's


def split(root: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (images, labels) of train (50 000), held_out (10 000) and extractor (10 000).

    Images are (n, 28, 28) uint8 in 0..255, labels (n,) uint8, each part in the order of its file.
    Within a class a fixed permutation decides, from RandomState, whose stream numpy has frozen.
    root: as for study.fashion_mnist.load, which raises StudyError for missing or broken files; of
    a user's own files too every sixth training image is left to the extractor.
    """
    arrays = load(root)
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = np.random.RandomState(SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within each
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order[EVERY - 1 :: EVERY]] = True
    return {
        "train": (images[~chosen], labels[~chosen]),
        "held_out": (arrays["test_images"], arrays["test_labels"]),
        "extractor": (images[chosen], labels[chosen]),
    }
