"""A mixture of low-rank Gaussians fitted to an image data set, and kept in a cache folder.

k-means on the pixels gives the first clusters. Of each cluster, n_k images with scatter A_k about
their mean, the covariance is shrunk to the pooled one within clusters, W = sum_k A_k / (n - K):

    (A_k + nu W) / (n_k - 1 + nu) = V diag(e) V^T,     U_k = the first q columns of V,
    s_k^2 = mean of e_i over i > q,  at least FLOOR^2,     l_ki = e_i - s_k^2,    w_k = n_k / n,

the closed form of probabilistic principal components (Tipping and Bishop 1999, eq. 3.12 to 3.15).
Then every image moves to its likeliest component and the components are fitted again, a few
times. Only training images are read. `python -m study.fitted digits` shows how good the fit is.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from study import subjects
from study.data import Dataset, load, to_float
from study.errors import StudyError
from study.folder import arrays, kept, npz
from study.identity import digest
from study.lowrank import LowRankMixture
from study.store import write_bytes

FIT = 1  # raise it when the same images and settings come to another fit
NU = 20.0  # weight of W in images: of 2 .. 50 best in cross-validation on the training digits
FLOOR = 0.01  # smallest s_k, about one grey level: the density is never degenerate
ROUNDS = 4  # of moving images to their likeliest component
SIDE = 5  # of the picture: images of either kind in a row


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine's cores: the same fit every time."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def fit(images: Tensor, components: int, rank: int) -> LowRankMixture:
    """The mixture of at most so many components fitted to images (n, ...) in [-1, 1].

    The same images give the same bits on one machine. Raises StudyError for fewer images than
    components.
    """
    if len(images) < components:
        raise StudyError(f"data.components: {components} given for {len(images)} training images")
    from sklearn.cluster import KMeans

    flat = images.flatten(1)
    with one_thread():
        means = KMeans(components, n_init=1, max_iter=30, random_state=0)
        labels = means.fit_predict(flat.float().numpy())
        x = flat.double().numpy()
        mixture = _components(x, labels, rank, tuple(images.shape[1:]))
        for _ in range(ROUNDS if components > 1 else 0):
            labels = mixture.component(flat, 0.0).numpy()
            mixture = _components(x, labels, rank, mixture.shape)
    return mixture


def _components(
    x: np.ndarray, labels: np.ndarray, rank: int, shape: tuple[int, ...]
) -> LowRankMixture:
    """One component for each label that points x (n, d) have."""
    from scipy.linalg import eigh

    names, counts = np.unique(labels, return_counts=True)
    n, d = x.shape
    means = np.stack([x[labels == k].mean(0) for k in names])
    centred = [x[labels == k] - mean for k, mean in zip(names, means, strict=True)]
    scatters = [y.T @ y for y in centred]
    pooled = sum(scatters) / max(n - len(names), 1)
    bases, spreads, stds = [], [], []
    for scatter, count in zip(scatters, counts, strict=True):
        covariance = (scatter + NU * pooled) / (count - 1 + NU)
        values, vectors = eigh(covariance, subset_by_index=(d - rank, d - 1))
        left = (np.trace(covariance) - values.sum()) / (d - rank)
        variance = max(left, FLOOR**2)
        bases.append(vectors.T)
        spreads.append(np.maximum(values - variance, 0))
        stds.append(math.sqrt(variance))
    parts = (means, np.stack(bases), np.stack(spreads), np.array(stds), np.log(counts / n))
    return LowRankMixture(shape, *(torch.from_numpy(np.ascontiguousarray(p)) for p in parts))


# --- the cache ---


def density(real: Dataset, components: int, rank: int) -> LowRankMixture:
    """The mixture fitted to a data set's training images, fitted once and then read; a file that
    is torn is made again."""
    settings = {"fit": FIT, "data": real.digest, "components": components, "rank": rank}
    return kept(
        f"fitted-{digest(settings, 16)}.npz",
        "the fit",
        read,
        lambda: fit(to_float(real.train), components, rank),
        _stored,
    )


def _stored(mixture: LowRankMixture) -> bytes:
    parts = {name: part.numpy() for name, part in mixture.tensors.items()}
    return npz(shape=np.array(mixture.shape), **parts)


def read(path: Path) -> LowRankMixture | None:
    """The mixture that a file holds, or None where it holds none."""
    parts = arrays(path)
    if parts.keys() != {field.name for field in fields(LowRankMixture)}:
        return None
    shape = tuple(parts.pop("shape").tolist())
    return LowRankMixture(shape, **{k: torch.from_numpy(v) for k, v in parts.items()})


# --- how good it is ---


def likelihoods(real: Dataset, mixture: LowRankMixture) -> tuple[float, float]:
    """Mean log density of the real training and held-out images, in nats per dimension."""
    parts = (to_float(real.train), to_float(real.held_out))
    return tuple(float(mixture.log_density(x, 0.0).double().mean() / x[0].numel()) for x in parts)


def picture(real: Dataset, mixture: LowRankMixture) -> bytes:
    """PNG: real held-out images on the left, as many draws of the mixture on the right."""
    from study.measure import grid

    n = 2 * SIDE * SIDE
    drawn = mixture.sample(n, torch.Generator().manual_seed(0))
    halves = [x.unflatten(0, (-1, SIDE)) for x in (to_float(real.held_out[:n]), drawn)]
    return grid(torch.cat(halves, 1).flatten(0, 1))


HELP = """Fits a mixture of low-rank Gaussians to the training images (once; then it is read from
the cache) and shows how good the fit is: the mean log density of real training and held-out
images, beside that of one Gaussian, and a picture of real images on the left, draws on the right.
"""


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m study.fitted", description=HELP)
    parser.add_argument("of", choices=["digits", "fashion_mnist"], help="the images")
    defaults = subjects.FittedMixture(of=subjects.Digits())
    parser.add_argument("--components", type=int, default=defaults.components,
                        help="Gaussians, at most (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rank", type=int, default=defaults.rank,
                        help="of each one's covariance, its diagonal aside (default: %(default)s)")
    parser.add_argument("--root", help="folder with Fashion-MNIST's files")
    parser.add_argument("--png", type=Path, help="the picture (default: fitted-DATA.png)")
    given = parser.parse_args(words)
    try:
        of = subjects.Digits() if given.of == "digits" else subjects.FashionMnist(root=given.root)
        real = load(of)
        start = time.perf_counter()
        mixture = density(real, given.components, given.rank)
        seconds = time.perf_counter() - start
        single = fit(to_float(real.train), 1, given.rank)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print("log density of real images, nats per dimension       training   held out")
    for name, model in ((f"mixture of {len(mixture.means)}", mixture), ("one Gaussian", single)):
        train, held_out = likelihoods(real, model)
        name = f"{name}, rank {given.rank}"
        print(f"{name:50}{train:11.4f}{held_out:11.4f}")
    low, high = (float(f()) for f in (mixture.stds.min, mixture.stds.max))
    print(f"noise across the basis s_k {low:.3f} to {high:.3f}; ready in {seconds:.1f} s")
    path = given.png or Path(f"fitted-{given.of}.png")
    write_bytes(path, picture(real, mixture))
    print(f"{path}: held-out images on the left, draws on the right")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
