"""What the probes look at: a run's loss at a snapshot, with the scores that they compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch

from study import gradients, rounding, schedules, seeds
from study.capture import compiled
from study.data import Dataset
from study.factors import Score
from study.losses import Problem
from study.models import Lookup, in_float32, level_range, make_problem, network
from study.posterior import law_of
from study.probes import geometric
from study.scores import Denoiser
from study.settings import named_sources
from study.spec import Run
from study.weights import snapshot_at


def problem_at(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    at: float,
    needed: Mapping[str, Denoiser],
) -> tuple[Problem, dict[str, torch.Tensor] | None]:
    """The run's loss at the raw weights of a snapshot, and Adam's second moment there. needed:
    denoisers by source id, beside those that the run's own score reads."""
    factors, state = run.recipe.factors, snapshot_at(lookup(run.id), at)
    net = network(factors, dataset)
    net.load_state_dict(state["raw"])
    problem = make_problem(run, sources, lookup, dataset, device, net.to(device))
    for name, follower in (("target", problem.average), ("own", problem.own)):
        if follower is not None:
            follower.load_state_dict(state[name])
    known = problem.known
    teachers = {**known.teachers, **needed}
    known = replace(known, law=known.law or law_of(dataset), teachers=teachers)
    return replace(problem, known=known), state.get("second_moment")


def gradient(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    at: float,
    record: Mapping[str, Any],
    teacher: Callable[[str], Denoiser],
) -> dict[str, Any]:
    """One gradient probe of one snapshot; teacher: a denoising source's D by its id. Its batches
    are the same for all variants of a block."""
    factors, sigma = run.recipe.factors, level_range(run.recipe.factors, dataset)
    scores = [msgspec.convert(record[k], Score) for k in ("score", "against") if k in record]
    needed = {i: teacher(i) for score in scores for i in named_sources(score)}
    problem, moment = problem_at(run, sources, lookup, dataset, device, at, needed)
    generator = torch.Generator(device).manual_seed(seeds.number(run.seed, record["kind"]))
    # of the last update, whose N these weights were trained at
    progress = max(0.0, at - factors.batch / factors.budget.images)
    N = schedules.grid_points(factors.discretization, progress)
    probe = gradients.Probe(
        problem, dataset, N, progress, record["batches"], factors.batch, generator
    )
    if record["kind"] == "gradient_slopes":
        return gradients.gradient_slopes(probe, *scores, record["N"])
    levels = geometric(sigma.min, sigma.max, record["sigmas"] + 1)[1:]
    if record["kind"] == "gradient_cosine":
        return gradients.gradient_cosine(probe, *scores, levels)
    if record["kind"] == "gradient_rounding":
        exact = in_float32(problem)
        compiled(problem.net, device)  # fused kernels round less: in half precision as it trained
        return rounding.gradient_rounding(probe, exact, levels)
    return gradients.gradient_noise(probe, levels, moment)


def denoisers(
    teachers: Iterable[str], dataset: Dataset, teacher: Callable[[str], Denoiser]
) -> dict[str, Denoiser]:
    """Every score whose trajectories are known: teachers, the population, the training set."""
    names = ("teacher", "second_teacher")
    known = {n: teacher(i) for n, i in zip(names, teachers, strict=False)}
    if dataset.density is not None:
        known["population"] = dataset.density.denoiser
    if dataset.train is not None:
        known["empirical"] = law_of(dataset).denoiser
    return known
