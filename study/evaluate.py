"""Samples from a snapshot, and how far they are from the data.

Consistency models draw in one step, x = f(sigma_max z, sigma_max), or two (Song et al. 2023,
Algorithm 1: noise to `mid`, once more f). Denoisers draw with EDM's deterministic Heun sampler.
The noise is addressed by (seed, draw) and is the same for all variants. Distances on features are
torch-fidelity's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from study import schedules, seeds
from study.data import Dataset, to_uint8
from study.errors import StudyError
from study.extractors.load import load as load_extractor
from study.factors import Sigma

CHUNK = 512
FID, KID = "frechet_inception_distance", "kernel_inception_distance_mean"
BETWEEN = 3  # a sample farther than this many std from every mode lies between modes

Function = Callable[[Tensor, Tensor], Tensor]


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
def samples(
    model: Function,
    record: Mapping[str, Any],
    shape: tuple[int, ...],
    sigma: Sigma,
    seed: int,
    draw: int,
    device: torch.device,
) -> Tensor:
    """record['samples'] samples (n, ...) with record['nfe'] network evaluations."""
    n, nfe, mid = record["samples"], record["nfe"], record["mid"]
    z = noise((n, *shape), device, seed, "sample", draw, 0)
    z_mid = noise((n, *shape), device, seed, "sample", draw, 1) if nfe == 2 else None
    parts = []
    for i in range(0, n, CHUNK):
        rows = slice(i, i + CHUNK)
        parts.append(
            heun(model, z[rows], nfe, sigma)
            if nfe > 2
            else multistep(model, z[rows], None if z_mid is None else z_mid[rows], mid, sigma)
        )
    return torch.cat(parts)


# --- images ---


@cache
def extractor(name: str, device: torch.device) -> torch.nn.Module:
    """A shipped extractor on a device."""
    return load_extractor(name).to(device)


@torch.no_grad()
def features(images: Tensor, name: str) -> Tensor:
    """Features (n, F) on the CPU of uint8 images (n, C, S, S)."""
    net = extractor(name, images.device)
    return torch.cat([net(part) for part in images.split(CHUNK)]).cpu()


@torch.no_grad()
def classes(images: Tensor, name: str) -> Tensor:
    """Class logits (n, classes) on the CPU, by the extractor's classifier, of images (n, C, S,
    S)."""
    net = extractor(name, images.device)
    parts = to_uint8(images).split(CHUNK)
    return torch.cat([net.classes(part) for part in parts]).cpu()


def fid(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two feature sets (n, F), by torch-fidelity."""
    stats = [fid_features_to_statistics(f) for f in (a, b)]
    return float(fid_statistics_to_metric(*stats, verbose=False)[FID])


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance of two feature sets of equal size, one subset of all n, by
    torch-fidelity."""
    out = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=len(a), verbose=False)
    return float(out[KID])


def references(dataset: Dataset, n: int) -> dict[str, Tensor]:
    """n training and n held-out images: a fixed choice, the same for every run and study. Of
    endless data the first are n draws of the population, the same on every device."""
    result = {}
    for name, x in (("train", dataset.train), ("held_out", dataset.held_out)):
        generator = torch.Generator().manual_seed(seeds.number(0, "reference", name))
        if x is None:
            result[name] = dataset.to(torch.device("cpu")).fresh(n, generator)
            continue
        order = torch.randperm(len(x), generator=generator)
        if len(x) < n:
            raise StudyError(f"{n} samples asked for, and the data have {len(x)} {name} images to "
                             "compare them with")  # fmt: skip
        result[name] = x[order[:n].to(x.device)]
    return result


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
