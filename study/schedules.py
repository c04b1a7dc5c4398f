"""Noise levels: the grid, how fine it is at which progress, and how (r, t) is drawn from u.

Karras grid of N points: sigma_i = (min^(1/rho) + i/(N-1) (max^(1/rho) - min^(1/rho)))^rho,
i = 0..N-1. A law maps a uniform u to a noise level by its inverse distribution function on
[min, max]; on a grid (r, t) are the ends of the interval that the level falls in, which for iCT's
law is p(sigma_i) ~ erf((ln sigma_{i+1} - P_mean) / (sqrt2 P_std)) - erf((ln sigma_i - P_mean) /
(sqrt2 P_std)) exactly (Song & Dhariwal 2023). All variants of a block map the same u.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from study.factors import (
    Discretization,
    Doubling,
    EctMapping,
    Ema,
    Fixed,
    Law,
    LognormalGrid,
    LogUniform,
    Progressive,
    Sigma,
    UniformGrid,
)

LEAST = 1e-4  # ECT's smallest relative step: above sigma_min, and at any stage, r < t in float32


def grid_points(discretization: Discretization, progress: float) -> float:
    """N, the number of grid points, at `progress` in [0, 1] of a run's own steps; without a grid
    the number of steps there would be, t / (t - r).

    Doubling is iCT's N(k) = min(s0 2^floor(k / K'), s1) + 1 with k / K = progress and
    K' = K / (log2 floor(s1 / s0) + 1). Progressive is CM's, N(k) = ceil(sqrt(k/K ((s1 + 1)^2 -
    s0^2) + s0^2) - 1) + 1 (Song et al. 2023, appendix C). ECT's is q^(s + 1) at stage s.
    """
    match discretization:
        case Fixed(N=N):
            return N
        case Doubling(s0=s0, s1=s1):
            stages = math.log2(s1 // s0) + 1 if s1 > s0 else 1.0
            return min(s0 * 2 ** int(progress * stages), s1) + 1
        case Progressive(s0=s0, s1=s1):
            root = math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2)
            return math.ceil(root - 1) + 1
        case EctMapping(q=q, stages=stages):
            return q ** (min(int(progress * stages), stages - 1) + 1)
        case _:
            assert_never(discretization)


def target_decay(target: Ema, N: int) -> float:
    """mu, the decay of an EMA target at N grid points (Song et al. 2023, appendix C)."""
    return target.mu if target.s0 is None else target.mu ** (target.s0 / N)


def warped(share: Tensor, sigma: Sigma) -> Tensor:
    """The level at a share in [0, 1] of the way from min to max in sigma^(1/rho)."""
    low, high = sigma.min ** (1 / sigma.rho), sigma.max ** (1 / sigma.rho)
    return (low + share * (high - low)) ** sigma.rho


def karras(i: Tensor, N: Tensor | int, sigma: Sigma) -> Tensor:
    """Grid point i of N, float64; exactly min at i = 0."""
    return torch.where(i == 0, sigma.min, warped(i.double() / (N - 1), sigma))


def level(law: Law, u: Tensor, sigma: Sigma) -> Tensor:
    """The noise level at quantile u (B,) of the law on [min, max], float64."""
    match law:
        case LognormalGrid(P_mean=mean, P_std=std):
            # on the host: a CUDA graph can't wait for a copy from there
            low, high = (
                math.erfc((mean - math.log(s)) / (std * math.sqrt(2))) / 2
                for s in (sigma.min, sigma.max)
            )
            normal = torch.special.ndtri(low + u.double() * (high - low))
            return torch.exp(mean + std * normal).clamp(sigma.min, sigma.max)
        case UniformGrid():
            return warped(u.double(), sigma).clamp(sigma.min, sigma.max)
        case LogUniform():
            ratio = math.log(sigma.max / sigma.min)
            return (sigma.min * torch.exp(u.double() * ratio)).clamp(sigma.min, sigma.max)
        case _:
            assert_never(law)


def pair(
    discretization: Discretization, law: Law, u: Tensor, N: Tensor | float, sigma: Sigma
) -> tuple[Tensor, Tensor]:
    """Levels r < t (B,), float32: neighbours on the grid of N points, or ECT's mapping of t."""
    t = level(law, u, sigma)
    if isinstance(discretization, EctMapping):
        t = t.clamp(min=sigma.min * (1 + LEAST))
        near = 1 + discretization.k * torch.sigmoid(-discretization.b * t)
        r = torch.minimum(t * (1 - near / N), t * (1 - LEAST)).clamp(min=sigma.min)
        return r.float(), t.float()
    low, high = sigma.min ** (1 / sigma.rho), sigma.max ** (1 / sigma.rho)
    share = (t ** (1 / sigma.rho) - low) / (high - low)
    i = (share * (N - 1)).floor().clamp(min=0).clamp(max=N - 2)
    r, t = karras(torch.stack((i, i + 1)), N, sigma).float()  # at once: half the kernels
    return r, t
