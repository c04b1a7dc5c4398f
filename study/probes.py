"""Probes: unbiased estimates, with standard errors, of what the training signal is made of.

Score error at level t, over x ~ data and x_t = x + t z. Given x_t the clean x is itself a draw
from the posterior, so a second posterior draw x'' gives a second, independent estimate D^'':
    variance    E |D^' - D^''|^2 / 2
    bias^2      E <D^' - D*, D^'' - D*>             D* the population's denoiser, where known
    distance^2  E <D^' - D_emp, D^'' - D_emp>       D_emp the training set's; not a bias: a teacher
                                                    that generalises is meant to differ from it
    held out    E <x_test - D^', x_test - D^''>     the denoising loss of the estimate's mean
in squared units of x, summed over dimensions; / t^2 gives velocity units, / t^4 score units.
Beside them the median over points of the posterior's effective sample size 1 / sum_i w_i^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from study import noise, seeds
from study.consistency import along
from study.data import Dataset, to_float
from study.factors import Score, Sigma
from study.posterior import law_of
from study.scores import Knowledge, Point, estimate

BATCHES = 2004  # the noise stream of keys, one for each batch
OWN_WEIGHT = 0.99  # t*: the posterior still is a point


def mean_and_error(rows: Tensor) -> tuple[float, float]:
    """Mean and standard error of independent rows (n,)."""
    rows = rows.double()
    return float(rows.mean()), float(rows.std() / math.sqrt(len(rows)))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per row (B,)."""
    return (a * b).flatten(1).sum(1)


def geometric(low: float, high: float, count: int) -> list[float]:
    """Levels from low to high, equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def noised(x: Tensor, level: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_t = x + t z of points x (B, ...), and t (B,)."""
    t = torch.full((len(x),), level, device=x.device)
    z = torch.randn(x.shape, generator=generator, device=x.device)
    return x + along(t, x) * z, t


@torch.no_grad()
def score_error(
    score: Score,
    known: Knowledge,
    dataset: Dataset,
    sigma: Sigma,
    sigmas: int,
    samples: int,
    batch: int | None = None,
) -> dict[str, Any]:
    """The score error of one estimate on `sigmas` levels, `samples` points each; batch: how many
    are estimated together, where that matters (all, if None).

    Returns lists over sigma; a quantity that the data do not define is None. The points are the
    same for every score.
    """
    device = dataset.held_out.device
    finite, density = dataset.train is not None, dataset.density
    law = law_of(dataset)
    held_out = to_float(dataset.held_out[:samples])
    result: dict[str, Any] = {"sigma": geometric(sigma.min, sigma.max, sigmas)}
    names = ("variance", "bias2", "distance2", "held_out_loss")
    result |= {n: [] for name in names for n in (name, f"{name}_se")}
    result |= {"posterior_variance": [], "effective_samples": []}

    def estimated(at: Point) -> Tensor:
        rows = batch or len(at.x)
        parts = zip(*(part.split(rows) for part in (at.x, at.x_t, at.t)), strict=True)
        keys = noise.words(at.draw, BATCHES, (-(-len(at.x) // rows),)) >> 1
        return torch.cat(
            [estimate(score, known, Point(*p, k)) for p, k in zip(parts, keys, strict=True)]
        )

    def put(name: str, rows: Tensor | None) -> None:
        value = (None, None) if rows is None else mean_and_error(rows)
        result[name].append(value[0])
        result[f"{name}_se"].append(value[1])

    for i, level in enumerate(result["sigma"]):
        generator = torch.Generator(device).manual_seed(seeds.number(0, "score_error", i))
        x = dataset.draw(samples, generator)
        keys = torch.randint(2**31, (8,), generator=generator, device=device)
        x_t, t = noised(x, level, generator)
        again = law.posterior_draws(x_t, t, keys[0], 1)[0]
        first, second = (
            estimated(Point(clean, x_t, t, key)) for clean, key in ((x, keys[1]), (again, keys[2]))
        )
        put("variance", dot(first - second, first - second) / 2)

        truth = density.denoiser(x_t, t) if density else None
        put("bias2", None if truth is None else dot(first - truth, second - truth))
        mean = law.denoiser(x_t, t) if finite else None
        put("distance2", None if mean is None else dot(first - mean, second - mean))
        result["posterior_variance"].append(float(law.posterior_variance(x_t, t).mean()))
        sizes = law.effective_samples(x_t, t) if finite else None
        result["effective_samples"].append(None if sizes is None else float(sizes.median()))

        x_t, t = noised(held_out, level, generator)
        draws = law.posterior_draws(x_t, t, keys[3], 2)
        first, second = (
            estimated(Point(clean, x_t, t, key))
            for clean, key in zip(draws, keys[4:], strict=False)
        )
        put("held_out_loss", dot(held_out - first, held_out - second))
    return result | {
        "known": density is not None,
        "dimension": math.prod(dataset.shape),
        "t_star": t_star(dataset, sigma),
    }


@torch.no_grad()
def t_star(dataset: Dataset, sigma: Sigma, samples: int = 256) -> float | None:
    """The largest level at which the mean posterior weight of the generating image is >= .99, to
    1 %: below it the empirical posterior is a point and any test of variance is empty. 0 if it is
    a point nowhere, None if data are endless.
    """
    if dataset.train is None:
        return None
    device, posterior = dataset.train.device, law_of(dataset)
    generator = torch.Generator(device).manual_seed(seeds.number(0, "t_star"))
    rows = torch.randint(dataset.size, (samples,), generator=generator, device=device)
    x = dataset.at(rows)
    z = torch.randn(x.shape, generator=generator, device=device)

    def is_point(level: float) -> bool:
        t = torch.full((samples,), level, device=device)
        own = posterior.weights(x + along(t, x) * z, t).gather(1, rows[:, None])
        return float(own.mean()) >= OWN_WEIGHT

    low, high = sigma.min, sigma.max  # the weight falls with t: bisect between them
    if not is_point(low):
        return 0.0
    if is_point(high):
        return high
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_point(middle) else (low, middle)
    return low


@lru_cache(maxsize=1)
def exact_points(
    dataset: Dataset, levels: tuple[float, ...], low: float, samples: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each level noisy points x_t (n, ...), t (n,) and the exact map to level `low`: the same
    for every snapshot, and what costs most where the density is one of images."""
    device, points = dataset.held_out.device, []
    for i, level in enumerate(levels):
        generator = torch.Generator(device).manual_seed(seeds.number(0, "map_error", i))
        x = dataset.fresh(samples, generator)
        x_t, t = noised(x, level, generator)
        points.append((x_t, t, dataset.density.ode_map(x_t, level, low)))
    return points


@torch.no_grad()
def map_error(
    f: Callable[[Tensor, Tensor], Tensor],
    dataset: Dataset,
    sigma: Sigma,
    sigmas: int,
    samples: int,
) -> dict[str, Any]:
    """RMS distance per coordinate of f(x_t, t) to the exact consistency map, the PF-ODE's solution
    from t to sigma_min under the known density, per level and over all levels."""
    levels = geometric(sigma.min, sigma.max, sigmas + 1)[1:]
    points = exact_points(dataset, tuple(levels), sigma.min, samples)
    squares = [float((f(x_t, t) - exact).double().square().mean()) for x_t, t, exact in points]
    return {
        "sigma": levels,
        "rms": [math.sqrt(s) for s in squares],
        "value": math.sqrt(sum(squares) / len(squares)),
    }
