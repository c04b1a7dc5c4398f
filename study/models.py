"""What a run is made of: its network, its loss, and what it reads of finished runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import assert_never

import msgspec
import torch
from torch import nn

from study import data, networks
from study.capture import compiled, in_rows
from study.consistency import Function, Problem, consistency, denoiser
from study.data import Dataset
from study.errors import StudyError
from study.factors import (
    Adam,
    Analytic,
    Consistency,
    Ema,
    Empirical,
    Factors,
    FromRun,
    Frozen,
    Optimizer,
    RAdam,
    Sigma,
    Teacher,
    ignored,
)
from study.scores import Knowledge, Posterior
from study.spec import Run
from study.store import Folder
from study.weights import snapshot_name, weights_at

Lookup = Callable[[str], Folder]  # a run's folder by its id


def check_inputs(run: Run, lookup: Lookup, dataset: Dataset) -> dict[str, str]:
    """SHA-256 of the final snapshot of each run that this one reads, by id.

    Raises StudyError where a finished run, this one or a source, was trained on other data.
    """
    own, sources = lookup(run.id).trained, {i: lookup(i).trained for i in run.refs.values()}
    for name, trained in {run.id: own, **sources}.items():
        if trained and trained["data_digest"] != dataset.digest:
            raise StudyError(
                f"{lookup(name).path}: trained on data {trained['data_digest']}, and the data are "
                f"now {dataset.digest}; bring the old data back, or remove the folder"
            )
    inputs = {i: t["sha256"][snapshot_name(1.0)] for i, t in sources.items() if t}
    if own and own["inputs"] != inputs:
        raise StudyError(
            f"{lookup(run.id).path}: trained from another {', '.join(run.refs)} than its source "
            "now holds; bring the old source back, or remove this folder"
        )
    return inputs


def level_range(factors: Factors, dataset: Dataset) -> Sigma:
    """The noise levels with sigma_data measured where the study does not give it."""
    sigma = factors.sigma
    return sigma if sigma.data else msgspec.structs.replace(sigma, data=dataset.std)


def finished(
    factors: Factors,
    folder: Folder,
    dataset: Dataset,
    device: torch.device,
    rows: int,
    at: float = 1.0,
    ema: float | None = None,
) -> Function:
    """A trained run as its function, in the precision it was trained in: the denoiser D(x_t, t)
    or the consistency model f(x_t, t). rows: the batch that it is compiled for on a GPU."""
    net = networks.build(factors.network, dataset.shape, 0.0, 0, "", factors.precision)
    net.load_state_dict(weights_at(folder, at, ema or factors.weights_ema[0]))
    net = compiled(net.eval().requires_grad_(False), device)
    function = consistency if isinstance(factors.objective, Consistency) else denoiser
    sigma = level_range(factors, dataset)
    return in_rows(lambda x_t, t: function(net, x_t, t, sigma), rows, device)


def knowledge(
    run: Run, sources: Mapping[str, Run], lookup: Lookup, dataset: Dataset, device: torch.device
) -> Knowledge:
    """What the run's score consults, loaded."""
    factors = run.recipe.factors
    if "score" in ignored(factors):
        return Knowledge()
    match factors.score:
        case Teacher():
            source = run.refs["score"]
            teacher = sources[source].recipe.factors
            return Knowledge(
                teacher=finished(teacher, lookup(source), dataset, device, factors.batch)
            )
        case Empirical():
            return Knowledge(posterior=Posterior(data.to_float(dataset.train)))
        case Analytic():
            return Knowledge(density=dataset.density)
        case _:
            return Knowledge()


def initial(run: Run, sources: Mapping[str, Run], lookup: Lookup, dataset: Dataset) -> nn.Module:
    """The student at its first step, on the CPU."""
    factors = run.recipe.factors
    net = networks.build(
        factors.network,
        dataset.shape,
        factors.dropout,
        run.seed,
        run.recipe.role,
        factors.precision,
    )
    if isinstance(factors.init, FromRun):
        source = run.refs["init"]
        first = sources[source].recipe.factors.weights_ema[0]
        net.load_state_dict(weights_at(lookup(source), 1.0, first))
    return net


def make_optimizer(kind: Optimizer, net: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters of the network."""
    match kind:
        case Adam(lr=lr, betas=betas, eps=eps):
            return torch.optim.Adam(net.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        case RAdam(lr=lr, betas=betas, eps=eps):
            return torch.optim.RAdam(net.parameters(), lr=lr, betas=betas, eps=eps)
        case _:
            assert_never(kind)


def make_problem(
    run: Run,
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    net: nn.Module,
) -> Problem:
    """The run's loss. An averaged target starts as the student does."""
    factors = run.recipe.factors
    average = frozen = None
    target = None if "target" in ignored(factors) else factors.target
    if isinstance(target, Ema):
        average = compiled(copy.deepcopy(net).requires_grad_(False), device)
    elif isinstance(target, Frozen):
        source = run.refs["target"]
        model = sources[source].recipe.factors
        frozen = finished(model, lookup(source), dataset, device, factors.batch)
    return Problem(
        factors,
        level_range(factors, dataset),
        net,
        knowledge(run, sources, lookup, dataset, device),
        frozen,
        average,
    )
