"""What a run is made of: its network, its loss, and what it reads of finished runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import assert_never

import msgspec
import torch
from torch import Tensor, nn

from study import interop, networks, oracle, schedules
from study.capture import compiled, in_rows
from study.consistency import Function, consistency, denoised, denoiser, scaled
from study.data import Dataset
from study.errors import StudyError
from study.factors import (
    Adam,
    Analytic,
    Consistency,
    Continuous,
    Ema,
    Factors,
    FixedPoint,
    FromRun,
    Frozen,
    Objective,
    Optimizer,
    Own,
    RAdam,
    Sigma,
)
from study.losses import Problem
from study.meaning import has_head, ignored, reads_law, references
from study.networks import Network
from study.places import present, weights_file
from study.posterior import law_of
from study.scores import Denoiser, Knowledge
from study.spec import Run
from study.store import Folder, sha256
from study.weights import snapshot_name, weights_at

Lookup = Callable[[str], Folder]  # a run's folder by its id


def check_inputs(run: Run, lookup: Lookup, dataset: Dataset) -> dict[str, str]:
    """SHA-256 of the final snapshot of each run that this one reads, by id, and of the file that
    its weights come from, by name.

    Raises StudyError where a finished run, this one or a source, was trained on other data, or
    this one from other weights. Of a finished run the file may be gone.
    """
    own, sources = lookup(run.id).trained, {i: lookup(i).trained for i in run.refs.values()}
    for name, trained in {run.id: own, **sources}.items():
        if trained and trained["data_digest"] != dataset.digest:
            raise StudyError(
                f"{lookup(name).path}: trained on data {trained['data_digest']}, and the data are "
                f"now {dataset.digest}; bring the old data back, or remove the folder"
            )
    inputs = {i: lookup(i).digest(snapshot_name(1.0)) for i, t in sources.items() if t}
    names = dict(run.refs)
    if file := weights_file(run.recipe.factors):
        names[str(file)] = file.name
        gone = own and not file.exists()
        inputs[file.name] = own["inputs"].get(file.name) if gone else sha256(present(file))
    if own and own["inputs"] != inputs:
        changed = [k for k, name in names.items() if own["inputs"].get(name) != inputs.get(name)]
        raise StudyError(
            f"{lookup(run.id).path}: trained from another {', '.join(changed)} than is there now; "
            "bring the old one back, or remove the folders of all runs that stand on it"
        )
    return inputs


def level_range(factors: Factors, dataset: Dataset) -> Sigma:
    """The noise levels with sigma_data measured where the study does not give it."""
    sigma = factors.sigma
    return sigma if sigma.data else msgspec.structs.replace(sigma, data=dataset.std)


def network(factors: Factors, dataset: Dataset, seed: int = 0, role: str = "") -> Network:
    """The run's network on the CPU, its weights those addressed by (seed, role)."""
    shape, drop, head = dataset.shape, factors.dropout, has_head(factors)
    return networks.build(factors.network, shape, drop, seed, role, factors.precision, head)


def fixed_point(factors: Factors, dataset: Dataset) -> Function:
    """f(x_T, T) (B, 1) of the oracle, whatever t it is called with."""
    sigma, N = level_range(factors, dataset), schedules.grid_points(factors.discretization, 1.0)
    match factors.score:
        case Analytic():
            f = oracle.consistency_distillation(dataset.density, sigma, N, factors.solver)
        case _:
            draws = getattr(factors.score, "k", 1)
            f = oracle.consistency_training(dataset.density, sigma, N, factors.distance, draws)
    return lambda x_t, _: torch.as_tensor(f(x_t[:, 0].double(), sigma.max)).to(x_t)[:, None]


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
    or the consistency model f(x_t, t). rows: the batch that it is compiled for on a GPU. A fixed
    point is known as a function at t = sigma_max."""
    if isinstance(factors.objective, FixedPoint):
        return fixed_point(factors, dataset)
    net = network(factors, dataset)
    net.load_state_dict(weights_at(folder, at, ema or factors.weights_ema[0]))
    return function_of(net, factors.objective, level_range(factors, dataset), device, rows)


def function_of(
    net: Network, objective: Objective, sigma: Sigma, device: torch.device, rows: int
) -> Function:
    """The denoiser D(x_t, t) or the consistency model f(x_t, t) of a network with its weights."""
    net = compiled(net.eval().requires_grad_(False), device)
    models = isinstance(objective, Consistency | Continuous)
    function = consistency if models else denoiser
    return in_rows(lambda x_t, t: function(net, x_t, t, sigma), rows, device)


def teachers(
    needed: Mapping[str, str],
    sources: Mapping[str, Run],
    lookup: Lookup,
    dataset: Dataset,
    device: torch.device,
    rows: int,
) -> dict[str, Denoiser]:
    """Finished denoisers by the source's name. needed: their ids by name."""
    return {
        name: finished(sources[i].recipe.factors, lookup(i), dataset, device, rows)
        for name, i in needed.items()
    }


def knowledge(
    run: Run, sources: Mapping[str, Run], lookup: Lookup, dataset: Dataset, device: torch.device
) -> Knowledge:
    """What the run's score and labels consult, loaded."""
    factors = run.recipe.factors
    unread = ignored(factors)
    needed = {
        name: run.refs[path]
        for path, name in references(factors).items()
        if path.split(".")[0] in ("score", "auxiliary")
    }
    return Knowledge(
        law=law_of(dataset) if "score" not in unread and reads_law(factors) else None,
        density=dataset.density,
        teachers=teachers(needed, sources, lookup, dataset, device, factors.batch),
    )


def initial(run: Run, sources: Mapping[str, Run], lookup: Lookup, dataset: Dataset) -> nn.Module:
    """The student at its first step, on the CPU."""
    factors = run.recipe.factors
    net = network(factors, dataset, run.seed, run.recipe.role)
    if isinstance(factors.init, FromRun):
        source = run.refs["init"]
        first = sources[source].recipe.factors.weights_ema[0]
        weights = weights_at(lookup(source), 1.0, first)
        own = {k: v for k, v in net.state_dict().items() if k.startswith("head.")}
        shared = {k: v for k, v in weights.items() if not k.startswith("head.")}
        net.load_state_dict({**own, **shared, **{k: weights[k] for k in own if k in weights}})
    elif file := weights_file(factors):
        outside = interop.read(file)
        as_is = factors.budget.images == 0
        interop.agree(outside, factors.objective, level_range(factors, dataset), as_is)
        net.load_state_dict(interop.fit(outside, net))
    return net


def check_fit(outside: interop.Outside, factors: Factors, shape: tuple[int, ...]) -> None:
    """The file's weights are of the run's network and of its noise levels, told before there are
    data or a network but in shape; x is of `shape`. Raises StudyError as `initial`, a measured
    sigma_data aside."""
    sigma = factors.sigma
    if "data" in outside.sigma and not sigma.data:
        sigma = msgspec.structs.replace(sigma, data=outside.sigma["data"])
    interop.agree(outside, factors.objective, sigma, factors.budget.images == 0)
    kind, drop, head = factors.network, factors.dropout, has_head(factors)
    with torch.device("meta"):
        net = networks.made(kind, shape, drop, factors.precision, head)
    interop.fit(outside, net)


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
    """The run's loss. Averages of the student start as it does."""
    factors, sigma = run.recipe.factors, level_range(run.recipe.factors, dataset)
    known = knowledge(run, sources, lookup, dataset, device)
    average = own = frozen = None
    unread = ignored(factors)
    target = None if "target" in unread else factors.target

    def follower() -> nn.Module:
        return compiled(copy.deepcopy(net).requires_grad_(False), device)

    if isinstance(target, Ema):
        average = follower()
    elif isinstance(target, Frozen):
        source = run.refs["target"]
        model = sources[source].recipe.factors
        frozen = finished(model, lookup(source), dataset, device, factors.batch)
    if isinstance(factors.score, Own) and "score" not in unread:
        own = follower()
        known = replace(known, own=head_denoiser(own, sigma))
    return Problem(factors, sigma, net, known, frozen, average, own)


def head_denoiser(net: nn.Module, sigma: Sigma) -> Denoiser:
    """D(x_t, t) of a network's denoising head."""

    def own(x_t: Tensor, t: Tensor) -> Tensor:
        _, F = net(scaled(x_t, t, sigma), t.log() / 4, None, True)
        return denoised(F, x_t, t, sigma)

    return own


def in_float32(problem: Problem) -> Problem:
    """The same loss with the run's networks (student, target, own head) computed in float32, on
    the very tensors of its weights. What it reads of other runs keeps its own precision."""

    def twin(net: Network | None) -> Network | None:
        if net is not None:
            net = copy.copy(net)  # another object around the same parameters; not compiled
            net.dtype = torch.float32
        return net

    own, known = twin(problem.own), problem.known
    if own is not None:
        known = replace(known, own=head_denoiser(own, problem.sigma))
    net, average = twin(problem.net), twin(problem.average)
    f = msgspec.structs.replace(problem.factors, precision="float32")
    return replace(problem, factors=f, net=net, known=known, average=average, own=own)
