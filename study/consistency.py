"""Denoisers, consistency models and their losses.

Denoiser (Karras et al. 2022):     D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4),
    c_skip = s^2 / (t^2 + s^2),    c_out = t s / sqrt(t^2 + s^2),    c_in = 1 / sqrt(t^2 + s^2).
Consistency model (Song et al. 2023, appendix C): the same F and c_in with
    c_skip = s^2 / ((t - e)^2 + s^2),    c_out = s (t - e) / sqrt(t^2 + s^2),
so that f(x, e) = x exactly at e = sigma_min. s is sigma_data.

Loss: L = E[w(t, r) d(f(x_t, t), f^-(x_r, r))] with x_t = x + t z and x_r one solver step from x_t
to r along the slope (x_t - D^) / t; with D^ = x that is x + r z, consistency training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn

from study import schedules
from study.data import Batch
from study.factors import (
    L2,
    Denoising,
    Distance,
    Euler,
    Factors,
    Frozen,
    Heun,
    InverseStep,
    PseudoHuber,
    Sigma,
    Solver,
    Uniform,
    Weighting,
)
from study.scores import Knowledge, estimate

Function = Callable[[Tensor, Tensor], Tensor]


def along(level: Tensor, x: Tensor) -> Tensor:
    """Levels (B,) shaped to multiply x (B, ...)."""
    return level.view(-1, *(1,) * (x.ndim - 1))


def denoiser(
    net: nn.Module, x_t: Tensor, t: Tensor, sigma: Sigma, key: Tensor | None = None
) -> Tensor:
    """D(x_t, t) (B, ...), with EDM's preconditioning."""
    s, level = sigma.data, along(t, x_t)
    c_in = (level.square() + s * s).rsqrt()
    return (s * s * c_in.square()) * x_t + (level * s * c_in) * net(c_in * x_t, t.log() / 4, key)


def consistency(
    net: nn.Module, x_t: Tensor, t: Tensor, sigma: Sigma, key: Tensor | None = None
) -> Tensor:
    """f(x_t, t) (B, ...); returns x_t itself, bit for bit, at t = sigma_min."""
    s, level = sigma.data, along(t, x_t)
    above = level - sigma.min
    c_in = (level.square() + s * s).rsqrt()
    # = s^2 / (above^2 + s^2), in a form that is exactly 1 where above = 0, for any s
    c_skip = 1 / (1 + (above / s).square())
    return c_skip * x_t + (s * above * c_in) * net(c_in * x_t, t.log() / 4, key)


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
    squared = (a - b).square().flatten(1).sum(1)
    match kind:
        case L2():
            return squared / a[0].numel()
        case PseudoHuber(c0=c0):
            c = c0 * a[0].numel() ** 0.5
            # = sqrt(squared + c^2) - c, without its cancellation where squared << c^2
            return squared / ((squared + c * c).sqrt() + c)
        case _:
            assert_never(kind)


def weight(kind: Weighting, t: Tensor, r: Tensor) -> Tensor:
    """w(t, r) (B,)."""
    match kind:
        case InverseStep():
            return 1 / (t - r)
        case Uniform():
            return torch.ones_like(t)
        case _:
            assert_never(kind)


@dataclass(frozen=True)
class Problem:
    """All that a loss reads besides the batch: the student, what the score knows, a target that
    is not the student itself (its running average, or a frozen model)."""

    factors: Factors
    sigma: Sigma  # with sigma_data filled in
    net: nn.Module
    known: Knowledge = Knowledge()
    frozen: Function | None = None
    average: nn.Module | None = None

    def loss(self, batch: Batch, N: Tensor | int) -> Tensor:
        """The mean loss (scalar) of one batch; N grid points."""
        return self.losses(batch, N).mean()

    def losses(self, batch: Batch, N: Tensor | int) -> Tensor:
        """The loss of each row (B,)."""
        f, sigma, x, key = self.factors, self.sigma, batch.x, batch.key
        if isinstance(f.objective, Denoising):
            t = schedules.level(f.law, batch.u, sigma).float()
            error = denoiser(self.net, x + along(t, x) * batch.z, t, sigma, key) - x
            # EDM's weighting (t^2 + s^2) / (t s)^2 makes the loss of F uniform over t
            edm = (t.square() + sigma.data**2) / (t * sigma.data).square()
            return edm * error.square().flatten(1).sum(1)
        if isinstance(f.target, Frozen):
            # no step to divide by: the difference is not O(t - r), so the weight is 1
            t = schedules.level(f.law, batch.u, sigma).float()
            x_t = x + along(t, x) * batch.z
            with torch.no_grad():
                target = self.frozen(x_t, t)
            return distance(f.distance, consistency(self.net, x_t, t, sigma, key), target)
        r, t = schedules.pair(f.law, batch.u, N, sigma)
        x_t = x + along(t, x) * batch.z

        def slope(y: Tensor, s: Tensor) -> Tensor:
            return (y - estimate(f.score, self.known, x, y, s)) / along(s, y)

        with torch.no_grad():
            x_r = solver_step(f.solver, slope, x_t, t, r)
            target = consistency(self.average or self.net, x_r, r, sigma, key)  # same dropout mask
        student = consistency(self.net, x_t, t, sigma, key)
        return weight(f.weighting, t, r) * distance(f.distance, student, target)
