"""Statistics of independent replicates: what has to be free of noise is averaged over pairs of
different ones, before any ratio, and standard errors are the jackknife's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

CHUNK = 1 << 18  # parameters whose inner products are taken at a time, in float64
STEEPEST = 8.0  # power of N that is looked for

Values = dict[str, float | None]


def square(x: Tensor) -> float:
    """|x|^2, summed in float64."""
    return float(x.double().square().sum())


def gram(rows: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Inner products (m, m) of gradients (m, P) times scale, in float64 and on the CPU."""
    gram, scale = 0, torch.as_tensor(scale, device=rows.device).expand(rows.shape[1])
    for part, by in zip(rows.split(CHUNK, 1), scale.split(CHUNK), strict=True):
        part = part.double() * by
        gram = gram + part @ part.T
    return gram.cpu()


def across(gram: Tensor, kept: Tensor) -> float:
    """mean_{j != k} <a_j, b_k> over the replicates kept: <E a, E b>, unbiased."""
    gram, n = gram[kept][:, kept], len(kept)
    return float(gram.sum() - gram.trace()) / (n * (n - 1))


def variance(gram: Tensor, kept: Tensor) -> float:
    """sum_j |g_j - mean g|^2 / (n - 1) over the n replicates kept."""
    return float(gram.diagonal()[kept].mean()) - across(gram, kept)


def ratio(a: float, b: float) -> float | None:
    """a / b; None where b, an unbiased estimate, came out at 0 or below."""
    return a / b if b > 0 else None


def root(square: float | None) -> float | None:
    """The root of a square; None where it, an unbiased estimate, came out below 0."""
    return math.sqrt(square) if square is not None and square >= 0 else None


def cosine(ab: float, aa: float, bb: float) -> float | None:
    """ab / sqrt(aa bb); None where a squared length, an unbiased estimate, is not positive."""
    return ab / math.sqrt(aa * bb) if min(aa, bb) > 0 else None


def jackknife(statistic: Callable[[Tensor], Values], m: int) -> Values:
    """The statistic of all m replicates, given by their indices, and NAME_se, its standard error;
    None where it, or what is left without a replicate, has no value."""
    indices, result = torch.arange(m), {}
    without = [statistic(indices[indices != j]) for j in range(m)]
    for name, value in statistic(indices).items():
        left = [values[name] for values in without]
        known = value is not None and None not in left
        spread = torch.tensor(left, dtype=torch.float64).std(correction=0) if known else None
        result |= {name: value, f"{name}_se": float(spread) * math.sqrt(m - 1) if known else None}
    return result


def power(
    Ns: Sequence[int], values: Sequence[float | None], errors: Sequence[float | None]
) -> float | None:
    """p of the least-squares fit of a N^p, a > 0, to values with errors. Not by logarithms, which
    values near 0 bias. None where no p within STEEPEST fits best."""
    if None in values or not all(errors):
        return None
    y, e, n = (torch.tensor(part, dtype=torch.float64) for part in (values, errors, Ns))
    n = n.log() - n.log().mean()

    def unexplained(p: float) -> float:
        shape = (p * n).exp() / e
        return (
            -(float(shape @ (y / e)) ** 2) / float(shape @ shape) if shape @ (y / e) > 0 else 0.0
        )

    bounds = (-STEEPEST, STEEPEST)
    fit = minimize_scalar(unexplained, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return float(fit.x) if fit.fun < 0 and abs(fit.x) < STEEPEST - 1e-3 else None
