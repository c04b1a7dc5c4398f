"""Denoisers, consistency models, and the parts of their losses.

Denoiser (Karras et al. 2022):     D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4),
    c_skip = s^2 / (t^2 + s^2),    c_out = t s / sqrt(t^2 + s^2),    c_in = 1 / sqrt(t^2 + s^2).
Consistency model (Song et al. 2023, appendix C): the same F and c_in with
    c_skip = s^2 / ((t - e)^2 + s^2),    c_out = s (t - e) / sqrt(t^2 + s^2),
so that f(x, e) = x exactly at e = sigma_min. s is sigma_data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor, nn

from study.factors import (
    L1,
    L2,
    Distance,
    Edm,
    Euler,
    Heun,
    InverseStep,
    L2Norm,
    PseudoHuber,
    Sigma,
    Solver,
    Uniform,
    Weighting,
)

Function = Callable[[Tensor, Tensor], Tensor]


def along(level: Tensor, x: Tensor) -> Tensor:
    """Levels (B,) shaped to multiply x (B, ...)."""
    return level.view(-1, *(1,) * (x.ndim - 1))


def denoised(F: Tensor, x_t: Tensor, t: Tensor, sigma: Sigma) -> Tensor:
    """D (B, ...) of the network's output F at x_t."""
    s, level = sigma.data, along(t, x_t)
    c_in = (level.square() + s * s).rsqrt()
    return (s * s * c_in.square()) * x_t + (level * s * c_in) * F


def denoiser(
    net: nn.Module, x_t: Tensor, t: Tensor, sigma: Sigma, key: Tensor | None = None
) -> Tensor:
    """D(x_t, t) (B, ...), with EDM's preconditioning."""
    return denoised(net(scaled(x_t, t, sigma), t.log() / 4, key), x_t, t, sigma)


def scaled(x_t: Tensor, t: Tensor, sigma: Sigma) -> Tensor:
    """c_in x_t (B, ...), the network's input."""
    return x_t * (along(t, x_t).square() + sigma.data**2).rsqrt()


def skipped(F: Tensor, x_t: Tensor, t: Tensor, sigma: Sigma) -> Tensor:
    """f (B, ...) of the network's output F at x_t."""
    s, level = sigma.data, along(t, x_t)
    above = level - sigma.min
    c_in = (level.square() + s * s).rsqrt()
    # = s^2 / (above^2 + s^2), in a form that is exactly 1 where above = 0, for any s
    c_skip = 1 / (1 + (above / s).square())
    return c_skip * x_t + (s * above * c_in) * F


def consistency(
    net: nn.Module, x_t: Tensor, t: Tensor, sigma: Sigma, key: Tensor | None = None
) -> Tensor:
    """f(x_t, t) (B, ...); returns x_t itself, bit for bit, at t = sigma_min."""
    return skipped(net(scaled(x_t, t, sigma), t.log() / 4, key), x_t, t, sigma)


def solver_step(solver: Solver, slope: Function, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r (B, ...): one step of the probability-flow ODE from t to r; slope(x, t) = dx/dt."""
    match solver:
        case Euler():
            return x_t + along(r - t, x_t) * slope(x_t, t)
        case Heun():
            first = slope(x_t, t)
            second = slope(x_t + along(r - t, x_t) * first, r)
            return x_t + along(r - t, x_t) * (first + second) / 2
        case _:
            assert_never(solver)


def distance(kind: Distance, a: Tensor, b: Tensor) -> Tensor:
    """d(a, b) per row (B,)."""
    apart = (a - b).flatten(1)
    match kind:
        case L2():
            return apart.square().mean(1)
        case PseudoHuber(c0=c0):
            c, squared = c0 * a[0].numel() ** 0.5, apart.square().sum(1)
            # = sqrt(squared + c^2) - c, without its cancellation where squared << c^2
            return squared / ((squared + c * c).sqrt() + c)
        case L2Norm():
            return torch.linalg.vector_norm(apart, dim=1)  # its gradient at 0 is 0, not nan
        case L1():
            return apart.abs().mean(1)
        case _:
            assert_never(kind)


def weight(kind: Weighting, t: Tensor, r: Tensor, sigma: Sigma) -> Tensor:
    """w(t, r) (B,)."""
    match kind:
        case InverseStep():
            return 1 / (t - r)
        case Uniform():
            return torch.ones_like(t)
        case Edm():
            return (t.square() + sigma.data**2) / (t * sigma.data).square()
        case _:
            assert_never(kind)
