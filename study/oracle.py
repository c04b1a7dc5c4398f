"""Consistency models without training error: where CT and CD end up, in one dimension.

On a Gaussian mixture (study.mixtures) both methods have a fixed point that takes no network: the
minimiser over all functions of the loss between neighbouring levels r < t of the Karras grid, one
level at a time upward from f(x, sigma_min) = x.

Consistency distillation with the exact score moves x_t to one point, so no distance matters,
    f_t(x) = f_r(step(x, t, r)),                                     step: Euler or Heun,
which is composed at the points asked for, without a grid in x. Consistency training moves it at
random,
    f_t(x) = argmin_y E[d(y, f_r(x_r)) | x_t = x],        x_r = x + (r - t) (x - D^) / t,
D^ the mean of K draws from the posterior p(x_0 | x_t) (K = 1: the single sample of CT). Its law is
a Gaussian mixture again: K draws fall n_k times on component k with multinomial chance, and
    D^ | n ~ N(sum_k n_k M_k / K, sum_k n_k c_k / K^2),          M_k, c_k as in study.mixtures.
The minimiser is a location of f_r(x_r): its mean under L2, its median under the absolute
difference, one between them under pseudo-Huber. The posterior moves right with x, so every f_t
increases; a median passes through an increasing function, so that the median's fixed point is a
composition too, of the medians of x_r. The other two are tabulated.

On Gaussian data f_r is affine, and CT under L2 is Euler-CD at any N. On a mixture it is not: the
noise of the steps, each of variance ((t - r) / t)^2 Var[x_0 | x_t] / K, sums to order 1 / (N K),
and what starts within its root of a watershed of the flow ends between two modes. That share, of
order (N K)^(-1/2), is a bias: no batch and no training time removes it.

Tables: at each level nodes are added until f_t rises by at most RISE from one to the next, with
monotone cubics between them. Expectations within a component are Gauss-Hermite sums for the mean;
for pseudo-Huber, whose derivative is all but a step at small c, sums over cells on each of which
f_r counts as linear and is integrated in closed form. Up to N = 1280 shares of outputs are right
to 3e-4 under L2 and 7e-4 under pseudo-Huber, distances to 3e-4; fineness = 2 halves that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, assert_never

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.interpolate import PchipInterpolator
from scipy.special import gammaln, log_softmax, ndtr
from torch import Tensor

from study.consistency import solver_step
from study.factors import L1, L2, MOST_TERMS, Distance, L2Norm, PseudoHuber, Sigma, Solver
from study.mixtures import GaussianMixture
from study.schedules import karras

Array = np.ndarray  # float64
Location = Callable[[Array, Array], Array]  # of weights (B, C) and values (B, C, Q): (B,)

REACH = 9.0  # tables end this many standard deviations from the outermost mode
SPACING = 0.25  # between a table's first nodes, in standard deviations of the narrowest component
RISE = 0.01  # of f_t from node to node, in standard deviations of the data
NARROWEST = 1e-9  # where f_t jumps: the last split, in the unit of SPACING
POINTS = 16  # Gauss-Hermite points within a component at K = 1
CELLS = 48  # cells on +-6 standard deviations, in place of these under pseudo-Huber
BISECTIONS = 40  # brings a bracket below 1e-12 of its width


@dataclass(frozen=True)
class FixedPoint:
    """The consistency model that a method ends at, at every level of its grid."""

    levels: Tensor  # (N,), ascending from sigma_min to sigma_max
    maps: Callable[[int, Tensor], Tensor]  # f at level i, of points (B,)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """f_t(x), of x's shape, in float64 and the units of the data.

        Raises ValueError unless t is a level of the grid, to one part in a million.
        """
        i = int((self.levels - t).abs().argmin())
        if not math.isclose(float(self.levels[i]), t, rel_tol=1e-6):
            raise ValueError(f"oracle: {t} is no level of the grid of {len(self.levels)}")
        return self.maps(i, x.detach().double().reshape(-1)).reshape(x.shape)


def quantiles(sigma: Sigma, count: int) -> Tensor:
    """x_T (count,): the midpoint quantiles of the prior N(0, sigma_max^2), ascending, float64."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sigma.max * torch.special.ndtri(share)


def consistency_training(
    density: GaussianMixture,
    sigma: Sigma,
    N: int,
    distance: Distance,
    draws: int = 1,
    fineness: float = 1.0,
) -> FixedPoint:
    """CT's fixed point on N levels; D^ is the mean of `draws` posterior draws.

    fineness multiplies the nodes of every table and the points of every expectation.
    Raises ValueError if the density is not one-dimensional, N is below 2, or `draws` is below 1 or
    more than can be told apart: the law of D^ would have over MOST_TERMS components.
    """
    levels = grid(density, sigma, N)
    law = partial(mean_of_draws, density.to(dtype=torch.float64), hits(density, draws))
    match distance:
        case L1() | L2Norm():
            return composed(levels, partial(median_step, law))
        case L2():
            z, location = mean(max(6, math.ceil(fineness * POINTS / draws**0.5)))
        case PseudoHuber(c0=c0):
            z, location = huber(c0, max(8, math.ceil(fineness * CELLS / draws**0.5)))
        case _:
            assert_never(distance)
    return tabulated(levels, density, law, z, location, fineness)


def consistency_distillation(
    density: GaussianMixture, sigma: Sigma, N: int, solver: Solver
) -> FixedPoint:
    """CD's fixed point on N levels along the exact score, whatever the distance.

    Raises ValueError if the density is not one-dimensional or N is below 2.
    """
    levels, exact = grid(density, sigma, N), density.to(dtype=torch.float64)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return (x - exact.denoiser(x, t)) / t

    def step(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return solver_step(solver, slope, x[:, None], t.reshape(1), r.reshape(1))[:, 0]

    return composed(levels, step)


def pushforward(y: Any, density: GaussianMixture, sigma: Sigma, reach: float) -> dict[str, Any]:  # noqa: ANN401
    """How one-step outputs y (M,), one per prior quantile and in any order, are distributed.

    w2: Wasserstein-2 distance to the data smoothed at sigma_min, quantile to quantile, in units of
    the data. between: the share farther than `reach` standard deviations from every mode. masses:
    the share nearest (in standard deviations) to each mode; they sum to 1.
    Raises ValueError if the density is not one-dimensional.
    """
    y = torch.as_tensor(y).detach().double().reshape(-1).sort().values
    means, stds, weights = parameters(density)
    far = (y[:, None] - means).abs() / stds
    near, mode = far.min(1)
    wide = (stds**2 + sigma.min**2).sqrt()
    share = (torch.arange(len(y), dtype=torch.float64) + 0.5) / len(y)
    own = means + wide * torch.special.ndtri(share)[:, None]  # each mode's quantile: a bracket

    def above(x: Tensor) -> Tensor:
        return torch.special.ndtr((x[:, None] - means) / wide) @ weights > share

    exact = bisect(above, own.amin(1), own.amax(1))
    return {
        "w2": float((y - exact).square().mean().sqrt()),
        "between": float((near > reach).double().mean()),
        "masses": (torch.bincount(mode, minlength=len(means)) / len(y)).tolist(),
    }


# --- composed: one point goes to one point ---


def composed(levels: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> FixedPoint:
    """f_t = f_r o step(., t, r), from the level asked for down to the first."""

    def at(i: int, x: Tensor) -> Tensor:
        for j in range(i, 0, -1):
            x = step(x, levels[j], levels[j - 1])
        return x

    return FixedPoint(levels, at)


def median_step(law: Callable[..., Any], x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The median of x_r given x_t = x, (B,)."""
    weights, centres, stds = law(x.numpy(), float(t))

    def above(d: Array) -> Array:
        return (weights * ndtr((d[:, None] - centres) / stds)).sum(1) > 0.5

    middle = bisect(above, centres.min(1), centres.max(1))
    return x + (r - t) * (x - torch.from_numpy(middle)) / t


# --- tabulated: one point goes to a law ---


def tabulated(
    levels: Tensor,
    density: GaussianMixture,
    law: Callable[..., Any],
    z: Array,
    location: Location,
    fineness: float,
) -> FixedPoint:
    """f_t(x) = location of f_r(x_r) given x_t = x; z (Q,) are standard normal points."""
    means, stds, _ = (part.numpy() for part in parameters(density))
    tables: list[Callable[[Array], Array]] = [lambda x: x]

    def f(x: Array, t: float, r: float) -> Array:
        weights, centres, spread = law(x, t)
        drawn = centres[:, :, None] + spread[:, None] * z
        x_r = x[:, None, None] + (r - t) / t * (x[:, None, None] - drawn)
        return location(weights, tables[-1](x_r))

    rise = RISE * density.std() / fineness
    for r, t in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        wide = np.sqrt(stds**2 + t**2)
        low, high = (means - REACH * wide).min(), (means + REACH * wide).max()
        step = SPACING * wide.min()
        x = np.linspace(low, high, math.ceil(fineness * (high - low) / step) + 1)
        y = f(x, t, r)
        while True:
            steep = (np.diff(y) > rise) & (np.diff(x) > NARROWEST * step)
            if not steep.any():
                break
            after = np.flatnonzero(steep) + 1
            middles = (x[after - 1] + x[after]) / 2
            x, y = np.insert(x, after, middles), np.insert(y, after, f(middles, t, r))
        tables.append(interpolant(x, np.maximum.accumulate(y)))  # rounding aside, it rises
    return FixedPoint(levels, lambda i, x: torch.from_numpy(tables[i](x.numpy())))


def interpolant(x: Array, y: Array) -> Callable[[Array], Array]:
    """The monotone cubic through the nodes (n,), straight beyond them."""
    inner, ends = PchipInterpolator(x, y), np.diff(y)[[0, -1]] / np.diff(x)[[0, -1]]

    def at(points: Array) -> Array:
        inside = np.clip(points, x[0], x[-1])
        return inner(inside) + np.where(points < x[0], *ends) * (points - inside)

    return at


def mean(count: int) -> tuple[Array, Location]:
    """Points and location for L2: the mean."""
    z, shares = hermegauss(count)
    shares = shares / shares.sum()
    return z, lambda weights, values: (weights * (values @ shares)).sum(1)


def huber(c: float, count: int) -> tuple[Array, Location]:
    """Points and location for pseudo-Huber: the root in y of E[(v - y) / sqrt((v - y)^2 + c^2)].

    Within a cell whose ends lie a and b from y the integrand averages (R(b) - R(a)) / (b - a)
    = (a + b) / (R(a) + R(b)), R(u) = sqrt(u^2 + c^2).
    """
    z = np.linspace(-6, 6, count + 1)
    shares = np.diff(ndtr(z)) / (2 * ndtr(6) - 1)

    def location(weights: Array, values: Array) -> Array:
        def above(y: Array) -> Array:
            u = values - y[:, None, None]
            R = np.sqrt(u * u + c * c)
            pull = (u[..., 1:] + u[..., :-1]) / (R[..., 1:] + R[..., :-1])
            return (weights * (pull @ shares)).sum(1) < 0

        return bisect(above, values.min((1, 2)), values.max((1, 2)))

    return z, location


# --- the law of D^ ---


def hits(density: GaussianMixture, draws: int) -> Array:
    """All ways (C, components) in which `draws` draws can fall on the components."""
    parts = len(density.means)
    if draws < 1 or math.comb(draws + parts - 1, parts - 1) > MOST_TERMS:
        raise ValueError(f"oracle: can't average {draws} draws from {parts} components exactly")
    bars = combinations(range(draws + parts - 1), parts - 1)
    edges = np.array([(-1, *bar, draws + parts - 1) for bar in bars])
    return np.diff(edges) - 1.0


def mean_of_draws(
    density: GaussianMixture, n: Array, x: Array, t: float
) -> tuple[Array, Array, Array]:
    """Weights (B, C), centres (B, C) and standard deviations (C,) of D^ given x_t = x (B,)."""
    means, stds, _ = (part.numpy() for part in parameters(density))
    variance, draws = stds**2 + t**2, n[0].sum()
    joint = density.log_weights.numpy() - np.log(variance) / 2
    log_g = log_softmax(joint - (x[:, None] - means) ** 2 / (2 * variance), axis=1)
    chances = np.exp(log_g @ n.T + gammaln(draws + 1) - gammaln(n + 1).sum(1))
    centres = (t**2 * means + stds**2 * x[:, None]) / variance
    return chances, centres @ n.T / draws, np.sqrt(n @ (stds**2 * t**2 / variance)) / draws


def parameters(density: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations and weights (components,) of a mixture in one dimension."""
    if density.means.shape[1] != 1:
        raise ValueError(f"oracle: one dimension, not {density.means.shape[1]}")
    exact = density.to(device="cpu", dtype=torch.float64)
    return exact.means[:, 0], exact.stds, exact.log_weights.exp()


def grid(density: GaussianMixture, sigma: Sigma, N: int) -> Tensor:
    """The levels (N,) for this density."""
    parameters(density)
    if N < 2:
        raise ValueError(f"oracle: a grid has at least 2 levels, got {N}")
    return karras(torch.arange(N), N, sigma)


def bisect(above: Callable[[Any], Any], low: Any, high: Any) -> Any:  # noqa: ANN401
    """Where `above` turns true between low and high (B,), tensors or arrays."""
    where = torch.where if isinstance(low, Tensor) else np.where
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        over = above(middle)
        low, high = where(over, low, middle), where(over, middle, high)
    return (low + high) / 2
