"""Samples from a snapshot, and how far they are from the data.

Consistency models draw in one step, x = f(sigma_max z, sigma_max), or two (Song et al. 2023,
Algorithm 1: noise to `mid`, once more f). Denoisers draw with EDM's deterministic Heun sampler.
The noise is addressed by (seed, draw) and is the same for all variants. Distances on features are
torch-fidelity's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from study import schedules, seeds
from study.data import to_float
from study.errors import StudyError
from study.extractors import inception
from study.extractors.load import load as load_extractor
from study.extractors.names import is_inception
from study.factors import Sigma
from study.posterior import FEW, NEAR

CHUNK = 512
FID, KID = "frechet_inception_distance", "kernel_inception_distance_mean"
ROWS = 2048  # of a block of distances between features
BETWEEN = 3  # a sample farther than this many std from every mode lies between modes

Function = Callable[[Tensor, Tensor], Tensor]
Statistics = Mapping[str, np.ndarray]  # of features: their mean "mu" (F,), covariance "sigma"


def noise(shape: tuple[int, ...], device: torch.device, *address: object) -> Tensor:
    """Standard normal noise addressed by (seed, draw, ...)."""
    generator = torch.Generator(device).manual_seed(seeds.number(*address))
    return torch.randn(shape, generator=generator, device=device)


def filled(level: float, x: Tensor) -> Tensor:
    """The level as (B,) beside x (B, ...)."""
    return torch.full((len(x),), level, device=x.device)


def multistep(
    f: Function, z: Tensor, z_mid: Tensor | None, mid: float | None, sigma: Sigma
) -> Tensor:
    """One-step samples from noise z (B, ...); two-step ones where z_mid and mid are given."""
    x = f(sigma.max * z, filled(sigma.max, z))
    if z_mid is None:
        return x
    return f(x + math.sqrt(mid**2 - sigma.min**2) * z_mid, filled(mid, z))


def heun(D: Function, z: Tensor, nfe: int, sigma: Sigma) -> Tensor:
    """EDM's second-order sampler (Karras et al. 2022, Algorithm 1): nfe = 2 steps - 1."""
    steps = (nfe + 1) // 2
    levels = [
        float(s)
        for s in schedules.karras(
            torch.arange(steps - 1, -1, -1, dtype=torch.float64), steps, sigma
        )
    ] + [0.0]
    x = levels[0] * z
    for t, r in zip(levels, levels[1:], strict=False):
        slope = (x - D(x, filled(t, x))) / t
        guess = x + (r - t) * slope
        if r > 0:
            slope = (slope + (guess - D(guess, filled(r, x))) / r) / 2
            guess = x + (r - t) * slope
        x = guess
    return x


@torch.no_grad()
def sampled(
    model: Function,
    record: Mapping[str, Any],
    shape: tuple[int, ...],
    sigma: Sigma,
    seed: int,
    draw: int,
    device: torch.device,
    chunk: int = CHUNK,
) -> Iterator[Tensor]:
    """record['samples'] samples with record['nfe'] network evaluations, `chunk` (B, ...) at a
    time. Their noise is one draw, whatever `chunk` is."""
    n, nfe, mid = record["samples"], record["nfe"], record["mid"]
    z = noise((n, *shape), device, seed, "sample", draw, 0)
    z_mid = noise((n, *shape), device, seed, "sample", draw, 1) if nfe == 2 else None
    for i in range(0, n, chunk):
        rows = slice(i, i + chunk)
        yield (
            heun(model, z[rows], nfe, sigma)
            if nfe > 2
            else multistep(model, z[rows], None if z_mid is None else z_mid[rows], mid, sigma)
        )


def samples(
    model: Function,
    record: Mapping[str, Any],
    shape: tuple[int, ...],
    sigma: Sigma,
    seed: int,
    draw: int,
    device: torch.device,
    chunk: int = CHUNK,
) -> Tensor:
    """All of `sampled` (n, ...)."""
    return torch.cat(list(sampled(model, record, shape, sigma, seed, draw, device, chunk)))


# --- images ---


@cache
def extractor(
    identity: str, device: torch.device, weights: str | None = None
) -> torch.nn.Module:
    """The extractor NAME:DIGEST on a device. weights: the user's file, where it has one."""
    if is_inception(identity):
        return inception.load(identity, weights).to(device)
    return load_extractor(identity.partition(":")[0]).to(device)


@torch.no_grad()
def features(images: Tensor, net: torch.nn.Module) -> Tensor:
    """Features (n, F) on the CPU, by an extractor, of uint8 images (n, C, S, S)."""
    return torch.cat([net(part).cpu() for part in images.split(CHUNK)])


@torch.no_grad()
def classes(images: Tensor, net: torch.nn.Module) -> Tensor:
    """Class logits (n, classes) on the CPU, by the extractor's classifier, of uint8 images (n, C,
    S, S)."""
    return torch.cat([net.classes(part).cpu() for part in images.split(CHUNK)])


# numpy's own threads would wait for those of other workers, for longer than they save, and sums
# would depend on how many there are.
@threadpool_limits.wrap(limits=1)
def statistics(features: Tensor, device: torch.device) -> Statistics:
    """Mean (float32) and covariance (float64) of features (n, F), by torch-fidelity; on a GPU by
    `moments`, as InceptionV3's of 50 000 images take one core six seconds."""
    if device.type == "cpu":
        return fid_features_to_statistics(features)
    return moments(features.to(device))


def moments(features: Tensor) -> Statistics:
    """The same on the features' device, in float64."""
    x = features.double()
    return {"mu": x.mean(0).float().cpu().numpy(), "sigma": torch.cov(x.T).cpu().numpy()}


@threadpool_limits.wrap(limits=1)
def frechet(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians, by torch-fidelity."""
    return float(fid_statistics_to_metric(a, b, verbose=False)[FID])


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance of two feature sets of equal size, one subset of all n, by
    torch-fidelity."""
    out = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=len(a), verbose=False)
    return float(out[KID])


# --- vectors ---


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int) -> float:
    """(mean over directions of W2^2 between the projections)^(1/2) of two equal-sized sets (n,
    d)."""
    direction = noise((a.shape[1], projections), a.device, 0, "projection")
    direction = direction / direction.norm(dim=0)
    gaps = (a @ direction).sort(0).values - (b @ direction).sort(0).values
    return float(gaps.double().square().mean().sqrt())


def mode_mass(x: Tensor, means: Tensor, stds: Tensor) -> tuple[np.ndarray, float]:
    """Share of samples nearest (in std) to each mode and within reach of it, and the share between
    modes; in d dimensions a mode's reach is BETWEEN + sqrt(d) - 1 std."""
    far = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist") / stds  # (n, K)
    near, mode = far.min(1)
    inside = near <= BETWEEN + math.sqrt(x.shape[1]) - 1
    shares = torch.bincount(mode[inside], minlength=len(means)).cpu().numpy() / len(x)
    return shares, float(1 - inside.double().mean())


# --- what samples repeat, and what they leave out ---


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """L2 distance (n,), float64, from each of a (n, ...) to the nearest of b (m, ...), and its
    index (n,); of uint8 images as of x in [-1, 1].

    In many dimensions one product finds the NEAR nearest, up to float32's rounding, and plain
    differences in float64 decide among them; in few, all are plain differences.
    """
    a, b = (to_float(x).flatten(1) for x in (a, b))
    centre = b.mean(0)
    centred = b - centre
    half = centred.square().sum(1) / 2
    distances, indices = [], []
    for part in a.split(CHUNK):
        if b.shape[1] <= FEW:
            near = torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").neg()
        else:
            near = (part - centre) @ centred.T - half
        near = near.topk(min(NEAR, len(b)), 1).indices  # (B, NEAR)
        squares = [(part.double() - b[i]).square().sum(1) for i in near.unbind(1)]
        square, best = torch.stack(squares, 1).min(1, keepdim=True)
        distances.append(square[:, 0].sqrt())
        indices.append(near.gather(1, best)[:, 0])
    return torch.cat(distances), torch.cat(indices)


@lru_cache(maxsize=1)
def held_out_distance(train: Tensor, held_out: Tensor) -> float:
    """Median distance of held-out images to the training set: the same for every snapshot that
    asks with the same tensors."""
    return float(nearest(held_out, train)[0].median())


def nearer(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], n: int, m: int
) -> tuple[float, float]:
    """The share of samples whose nearest of n training images is nearer than that of m held-out
    ones, a tie counting half, from `nearest` of both; and the share's standard deviation over all
    ways of calling n of the n + m images the training set."""
    (own, own_index), (new, new_index) = train, held_out
    share = float(((own < new).double() + (own == new).double() / 2).mean())
    winners = torch.where(own <= new, own_index, n + new_index)
    wins = torch.bincount(winners, minlength=n + m).double()  # samples that an image is nearest to
    return share, float(wins.std()) * math.sqrt(n * m / (n + m)) / len(own)


@torch.no_grad()
def memorisation(samples: Tensor, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Are samples nearer to training images than to images that were never trained on? All (n,
    ...), uint8 images or x in [-1, 1]; distances are L2 over all pixels of x.

    "value": share of samples whose nearest of m training images is nearer than their nearest of m
    held-out ones, a tie counting half; "compared": m, the size of the smaller part, a fixed choice
    of each. 0.5 where nothing is memorised. Where every sample copies a training image it is 1 if
    all n of these are compared, but (1 + m / n) / 2 if m of them are, so "excess" compares all n
    with the m: (share - n / (n + m)) / (m / (n + m)), 0 where nothing is memorised, 1 where
    everything is, whatever the sizes.

    "value_se" is binomial, of the samples given the images. "null_se", "excess_null_se": standard
    deviations over all ways of calling as many of the compared images the training set, which is
    what luck in images and samples does where nothing is memorised: larger than binomial, as many
    samples may share a nearest image.

    "nearest_train", "nearest_held_out": median distance of samples, and of held-out images, to the
    nearest of the whole training set; "ratio": of the two (Meehan et al. 2020, arXiv 2004.05675,
    compare the same distances), 1 where samples are as new as new images.
    """
    n, m = len(train), min(len(train), len(held_out))
    chosen = {}
    for name, x in (("train", train), ("held_out", held_out)):
        generator = torch.Generator().manual_seed(seeds.number(0, "memorisation", name))
        chosen[name] = torch.randperm(len(x), generator=generator).to(x.device)
    new = nearest(samples, held_out[chosen["held_out"][:m]])
    own = whole = nearest(samples, train[chosen["train"][:m]])
    if n > m:
        rest = nearest(samples, train[chosen["train"][m:]])
        in_own = own[0] <= rest[0]
        whole = torch.minimum(own[0], rest[0]), torch.where(in_own, own[1], m + rest[1])
    value, null = nearer(own, new, m, m)
    share, share_null = nearer(whole, new, n, m)
    near, yardstick = float(whole[0].median()), held_out_distance(train, held_out)
    return {
        "value": value,
        "value_se": math.sqrt(value * (1 - value) / len(samples)),
        "null_se": null,
        "compared": m,
        "excess": 1 - (1 - share) * (n + m) / m,
        "excess_null_se": share_null * (n + m) / m,
        "nearest_train": near,
        "nearest_held_out": yardstick,
        "ratio": near / yardstick if yardstick else math.nan,
    }


def coverage(features: Tensor, reference_features: Tensor, neighbours: int) -> dict[str, Any]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), by
    torch-fidelity, of samples' features (n, F) and real ones' (m, F).

    "precision": share of samples that lie within some real image's distance to its
    `neighbours`-th nearest real one; "recall", which is "value": share of real images that lie
    within some sample's, likewise. Both grow with `neighbours` and depend on n and m: compare at
    equal ones. Raises StudyError where there are no more points than neighbours.
    """
    fewest = min(len(features), len(reference_features))
    if fewest <= neighbours:
        raise StudyError(f"coverage.neighbours: {neighbours} asked for among {fewest} samples")
    out = prc_features_to_metric(
        features,
        reference_features,
        prc_neighborhood=neighbours,
        prc_batch_size=ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    precision, recall = float(out["precision"]), float(out["recall"])
    return {"precision": precision, "recall": recall, "value": recall}


def class_histogram(logits: Tensor, reference_logits: Tensor) -> dict[str, Any]:
    """The classes that a classifier sees in samples and in real images, from logits (n, classes)
    and (m, classes).

    "shares", "reference_shares": share of each class, by the largest logit; "tv": the total
    variation distance of the two, half the sum of absolute differences; "entropy_ratio": entropy
    of the first over that of the second, below 1 where classes were lost.
    """
    shares, real = (
        torch.bincount(x.argmax(1), minlength=x.shape[1]).double() / len(x)
        for x in (logits, reference_logits)
    )
    entropies = [float(torch.special.entr(p).sum()) for p in (shares, real)]
    return {
        "shares": shares.tolist(),
        "reference_shares": real.tolist(),
        "tv": float((shares - real).abs().sum() / 2),
        "entropy_ratio": entropies[0] / entropies[1] if entropies[1] else math.nan,
    }
