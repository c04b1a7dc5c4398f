"""Is one trajectory, one output, true of a consistency model?

The probability-flow ODE of a denoiser D (Karras et al. 2022, arXiv 2206.00364, eq. 1),

    dx/dt = (x - D(x, t)) / t,

is solved by Heun's method from x(T) = T z, T = sigma_max and z ~ N(0, I), where one-step samples
start too, down to sigma_min = e, on a grid of rho = 7. An exact consistency model (Song et al.
2023, arXiv 2303.01469, definition 1) has f(x(t), t) = x(e) at every t. A path belongs to its
denoiser: the population's, where it is known, is the one that a model should follow; a teacher's
is the one that distillation follows; the training set's own leads to training images, and no model
that generalises follows it, so its number is read beside the others. Per path, at level t:

    error     f(x(t), t) - x(e)            towards the end of the path; 0 at t = e by construction
    drift     f(x(t), t) - f(x(T), T)      along the path, whatever its end
    spread    f(x(t), t) about its mean over the levels of the path: one number

and beside them the drift along the line x + t z from one clean x of the data by the same noise,
f(x + t z, t) - f(x + T z, T): consistency training moves along such lines, and no function is
constant on all of them. The floor is the distance of two teachers' ends, from the same start.

All are root mean squares over trajectories and coordinates, in the units of x, with standard
errors over trajectories (delta method). They hold the solver's error, which falls as steps^-2: at
64 steps 0.4 % of the data's standard deviation for Gaussian data, and more where D is sharp, as
the training set's own is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import torch
from torch import Tensor

from study import schedules, seeds
from study.data import Dataset
from study.evaluate import CHUNK, Function, filled, noise
from study.factors import Sigma
from study.mixtures import RHO
from study.probes import geometric

BEST = ("population", "teacher", "empirical")  # the path that `value` is of: the first there is


def grid(sigma: Sigma, steps: int) -> list[float]:
    """The solver's steps + 1 levels from sigma_min to sigma_max."""
    sigma = msgspec.structs.replace(sigma, rho=RHO)
    inner = schedules.karras(torch.arange(steps), steps + 1, sigma)
    return [*inner.tolist(), sigma.max]


def snapped(levels: Sequence[float], asked: Sequence[float]) -> list[int]:
    """Indices of the levels nearest in ratio to those asked, ascending, each once."""
    return sorted({
        min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / t))) for t in asked
    })  # fmt: skip


def solved(D: Function, x: Tensor, levels: Sequence[float], kept: Sequence[int]) -> Tensor:
    """Heun's solution from x (n, ...) at the highest level to the lowest: the points at the levels
    kept (len(kept), n, ...), in their order; 2 (len(levels) - 1) evaluations of D."""
    points = {len(levels) - 1: x}
    for i in range(len(levels) - 1, 0, -1):
        t, r = levels[i], levels[i - 1]
        slope = (x - D(x, filled(t, x))) / t
        ahead = x + (r - t) * slope
        x = x + (r - t) * (slope + (ahead - D(ahead, filled(r, x))) / r) / 2
        if i - 1 in kept:
            points[i - 1] = x
    return torch.stack([points[i] for i in kept])


@lru_cache(maxsize=len(BEST) + 1)
@torch.no_grad()
def path(
    D: Function, dataset: Dataset, sigma: Sigma, sigmas: int, samples: int, steps: int, seed: int
) -> Tensor:
    """The trajectories of D (levels, samples, ...), kept for the next snapshot that asks with the
    same objects."""
    z = noise((samples, *dataset.shape), dataset.held_out.device, seed, "trajectories")
    levels = grid(sigma, steps)
    kept = snapped(levels, geometric(sigma.min, sigma.max, sigmas))
    return torch.cat([solved(D, sigma.max * part, levels, kept) for part in z.split(CHUNK)], 1)


def lines(dataset: Dataset, levels: Sequence[float], samples: int, seed: int) -> Tensor:
    """x + t z (levels, samples, ...): training images, or fresh draws of endless data, and the
    noise of the paths."""
    device = dataset.held_out.device
    z = noise((samples, *dataset.shape), device, seed, "trajectories")
    generator = torch.Generator(device).manual_seed(seeds.number(seed, "trajectories", "x"))
    x = dataset.draw(samples, generator)
    return torch.stack([x + t * z for t in levels])


def outputs(f: Function, points: Tensor, levels: Sequence[float]) -> Tensor:
    """f at points (levels, n, ...), each at its own level, float64."""
    return torch.stack([
        torch.cat([f(part, filled(t, part)) for part in x.split(CHUNK)]).double()
        for x, t in zip(points, levels, strict=True)
    ])  # fmt: skip


def rms(deviation: Tensor) -> tuple[list[float], list[float]]:
    """Root mean square over trajectories and coordinates, and its standard error, of each row of
    (rows, n, ...)."""
    square = deviation.flatten(2).square().mean(2)  # (rows, n)
    value, n = square.mean(1).sqrt(), square.shape[1]
    error = square.std(1) / (2 * math.sqrt(n) * value)
    return value.tolist(), torch.where(value == 0, 0.0, error).tolist()


@torch.no_grad()
def trajectories(
    f: Function,
    denoisers: Mapping[str, Function],
    dataset: Dataset,
    sigma: Sigma,
    sigmas: int,
    samples: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """How far f(x (B, ...), t (B,)) is from constant, and from the end, along the trajectories of
    each denoiser D(x, t), of those named teacher, second_teacher, population and empirical that
    there are.

    "sigma": at most `sigmas` levels t, ascending, from sigma_min to sigma_max with equal ratios up
    to the solver's grid of `steps` steps. For each NAME of a denoiser lists over t, "NAME" (the
    error) and "drift_NAME", and the number "spread_NAME"; "straight": the list of the line.
    "floor": a number, None without two teachers. "value": the error at sigma_max on the path of
    "along", the first there is of population, teacher and empirical. All with their standard
    errors under KEY_se. The same `samples` starts and images for all models of a seed.
    """
    levels = grid(sigma, steps)
    at = [levels[i] for i in snapped(levels, geometric(sigma.min, sigma.max, sigmas))]
    result: dict[str, Any] = {"sigma": at}

    def put(name: str, deviation: Tensor) -> None:
        result[name], result[f"{name}_se"] = rms(deviation)

    def put_number(name: str, deviation: Tensor) -> None:
        result[name], result[f"{name}_se"] = (v[0] for v in rms(deviation[None]))

    ends = {}
    for name, D in denoisers.items():
        points = path(D, dataset, sigma, sigmas, samples, steps, seed)
        y, ends[name] = outputs(f, points, at), points[0].double()
        put(name, y - ends[name])
        put(f"drift_{name}", y - y[-1])
        # levels beside coordinates: a trajectory's mean is over both
        put_number(f"spread_{name}", (y - y.mean(0)).transpose(0, 1))
    y = outputs(f, lines(dataset, at, samples, seed), at)
    put("straight", y - y[-1])

    result |= dict.fromkeys(("floor", "floor_se", "value", "value_se", "along"))
    if {"teacher", "second_teacher"} <= ends.keys():
        put_number("floor", ends["teacher"] - ends["second_teacher"])
    for name in BEST:
        if name in ends:
            result |= {"value": result[name][-1], "value_se": result[f"{name}_se"][-1]}
            return result | {"along": name}
    return result
