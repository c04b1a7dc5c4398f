"""The three-way split of scikit-learn's 8 x 8 handwritten digits, defined once.

1 797 grey images of ten classes (Alpaydin and Kaynak's optical digits, UCI). The extractor that
measures a study must not have seen the images that the study trains on or compares with, so it has
400 images of its own; 400 are held out from everything, and 997 remain to train on.
"""

import numpy as np

SEED = 20240229
SIZES = {"extractor": 400, "held_out": 400}  # the rest is "train"


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (images, labels) of train (997), held_out (400) and extractor (400).

    Images are (n, 8, 8) uint8 in 0..255, labels (n,) uint8.
    A fixed permutation, stratified: sorted by class, every k-th image goes to the smaller part, so
    each part holds its share of each class to within one image. Pixel v of 0..16 becomes
    round(255 v / 16). The permutation is from RandomState, whose stream numpy has frozen.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    left = np.random.RandomState(SEED).permutation(len(labels))
    parts = {}
    for name, size in SIZES.items():
        rank = np.argsort(np.argsort(labels[left], kind="stable"))  # place when sorted by class
        chosen = (rank + 1) * size // len(left) > rank * size // len(left)
        parts[name] = (images[left[chosen]], labels[left[chosen]])
        left = left[~chosen]
    return {"train": (images[left], labels[left]), **parts}
