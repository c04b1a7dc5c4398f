"""The second, denoising head: beside f and never through it; and settings of a run that resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from studies import read, replaced
from test_training import CPU, close, same, trained
from torch import Tensor, nn

from study import networks, worker
from study.budget import passes
from study.consistency import denoised, scaled
from study.data import Batch
from study.factors import (
    L2,
    Budget,
    Consistency,
    Continuous,
    Denoising,
    DenoisingHead,
    Factors,
    Fixed,
    FromRun,
    Frozen,
    NoHead,
    Sigma,
)
from study.losses import Problem
from study.meaning import has_head
from study.models import initial
from study.scores import Knowledge
from study.spec import Run
from study.store import Store
from study.subjects import Mixture, Mlp, Network, Unet
from study.weights import weights_at

SIGMA = Sigma(data=0.5)
KINDS = [Mlp(width=8, depth=2), Unet(width=8, levels=2)]
HEAD = ("head.weight", "head.bias")


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, from a stream of its own for its name."""
    for name, parameter in net.named_parameters():
        number = seed + sum(map(ord, name))
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(*shape: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, *shape, generator=generator)
    u = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return Batch(0.5 * x, z, u, torch.tensor(77), torch.tensor(78))


def factors(**changes: object) -> Factors:
    plain = {"data": Mixture(means=((0.0,),), std=0.5), "network": Mlp(), "distance": L2()}
    return Factors(**plain | {"budget": Budget(images=1), "discretization": Fixed(N=20)} | changes)


# --- the network ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_f_is_the_same_with_a_second_head_and_without(kind: Network, precision: str) -> None:
    plain, second = (
        randomised(networks.build(kind, (1, 5, 5), 0.3, 0, "student", precision, head))
        for head in (False, True)
    )
    b = batch(6, 1, 5, 5)
    arguments = b.x, b.u.float(), b.mask
    F, other = second(*arguments, True)
    assert torch.equal(plain(*arguments), F) and torch.equal(second(*arguments), F)
    assert other.shape == F.shape == b.x.shape and other.dtype == F.dtype == torch.float32
    assert (other - F).abs().max() > 0.01  # its weights are its own


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_head_starts_at_zero_and_changes_no_other_weight(kind: Network) -> None:
    plain, second = (
        networks.build(kind, (1, 5, 5), 0.0, 3, "student", head=head) for head in (False, True)
    )
    weights = second.state_dict()
    assert {n for n in weights if n not in plain.state_dict()} == set(HEAD)
    assert same({n: w for n, w in weights.items() if n not in HEAD}, plain.state_dict())
    nn.init.normal_(second.out.weight)
    F, other = second(*batch(4, 1, 5, 5).x[None], torch.ones(4), None, True)
    assert other.abs().max() == 0 and F.abs().max() > 0


def test_a_run_has_a_head_where_its_loss_reads_one() -> None:
    head = DenoisingHead()
    frozen = Frozen(run="a")
    for objective, target, auxiliary, expected in [
        (Consistency(), None, head, True),
        (Consistency(), None, NoHead(), False),
        (Consistency(), frozen, head, True),
        (Continuous(), None, head, True),
        (Denoising(), None, head, False),
    ]:
        changes = {"target": target} if target else {}
        made = factors(objective=objective, auxiliary=auxiliary, **changes)
        assert has_head(made) == expected


# --- the auxiliary loss ---


def rows(net: nn.Module, b: Batch, known: Knowledge = Knowledge(), **changes: object) -> Tensor:  # noqa: B008
    return Problem(factors(**changes), SIGMA, net, known, lambda x_t, t: 0 * x_t).losses(b, 20)


def teacher(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x_t) / (1 + t[:, None])


LABELLED = [DenoisingHead(weight=0.7), DenoisingHead(weight=0.7, labels=FromRun(run="edm"))]


@pytest.mark.parametrize("auxiliary", LABELLED, ids=["data", "teacher"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": Continuous()}, {"target": Frozen(run="a")}],
    ids=["consistency", "continuous", "frozen"],
)
def test_auxiliary_loss_is_edms_per_dimension(auxiliary: DenoisingHead, changes: dict) -> None:
    """0.7 (t^2 + s^2) / (t s)^2 |D - label|^2 / d beside the loss, of x or the teacher's D."""
    net, b = randomised(networks.build(Mlp(width=8), (3,), 0.0, 0, "", head=True)), batch(40, 3)
    known = Knowledge(teachers={"edm": teacher})
    with_it, without = (
        rows(net, b, known, auxiliary=a, **changes).detach() for a in (auxiliary, NoHead())
    )
    _, t = Problem(factors(**changes), SIGMA, net).levels(b, 20)
    x_t = b.x + t[:, None] * b.z
    with torch.no_grad():
        D = denoised(net(scaled(x_t, t, SIGMA), t.log() / 4, None, True)[1], x_t, t, SIGMA)
    label = teacher(x_t, t) if isinstance(auxiliary.labels, FromRun) else b.x
    error = 0.7 * (t**2 + 0.25) / (0.5 * t) ** 2 * (D - label).square().mean(1)
    assert error.min() > 1e-4
    torch.testing.assert_close(with_it, without + error, rtol=1e-5, atol=1e-5)


def test_each_loss_reaches_its_own_head_and_both_the_trunk() -> None:
    """From weights 1 to 3 of the auxiliary loss only its own gradient grows: `out` sees none of
    it, the head three times as much, the trunk the difference."""
    for kind, shape in [(KINDS[0], (3,)), (KINDS[1], (1, 5, 5))]:
        found = []
        for w in (1.0, 3.0):
            net = randomised(networks.build(kind, shape, 0.3, 0, "", head=True))
            rows(net, batch(20, *shape), auxiliary=DenoisingHead(weight=w)).sum().backward()
            found.append({n: p.grad for n, p in net.named_parameters()})
        one, three = found
        for name, gradient in one.items():
            if name.startswith("out."):
                assert torch.equal(gradient, three[name]) and gradient.abs().max() > 0
            elif name in HEAD:
                torch.testing.assert_close(three[name], 3 * gradient)
            else:
                assert (three[name] - gradient).norm() > 1e-3 * gradient.norm()


def test_denoising_leaves_the_head_out_of_a_source() -> None:
    """A source under a base that has `auxiliary`: its network has no head, nor has its loss."""
    net, b = networks.build(Mlp(width=8), (3,), 0.0, 0, ""), batch(20, 3)
    plain, asked = (
        rows(net, b, objective=Denoising(), auxiliary=a) for a in (NoHead(), DenoisingHead())
    )
    assert torch.equal(plain, asked)


# --- in runs ---


def done(folder: Path, text: str) -> tuple[dict[str, Run], Store]:
    """The study's runs of seed 0 by name, trained and measured."""
    study = read(folder, text, ("seeds=[0]",))
    store = Store(folder / "results", study)
    for run in study.runs:
        assert worker.work(run, study.unique, store.folders, "cpu") == worker.DONE
    return {r.recipe.name: r for r in study.runs}, store


VARIANTS = """\
  own: {from: ct, score: {kind: own, mu: 0.9}, auxiliary: denoising_head}
  aux: {from: ct, auxiliary: denoising_head}
  taught: {from: ct, auxiliary: {kind: denoising_head, labels: {run: edm}}}
  warm: {from: aux, init: {run: edm}}
  again: {from: aux, init: {run: aux_first}}
  bare: {from: ct, init: {run: aux_first}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Run], Store]:
    text = replaced("seeds: [0, 1]\n", f"{VARIANTS}seeds: [0, 1]\n")
    text = text.replace("  edm: {objective: denoising}",
                        "  edm: {objective: denoising}\n  aux_first: {from: aux}")  # fmt: skip
    text = text.replace("images: 1280}", "images: 25600}\n  optimizer: {kind: adam, lr: 5e-3}\n"
                        "  distance: l2\n  weighting: uniform")  # fmt: skip
    text = text.replace("width: 16, depth: 1", "width: 32, depth: 2")
    return done(tmp_path_factory.mktemp("heads"), text)


def test_variants_with_heads_train_to_their_budget(runs: tuple[dict[str, Run], Store]) -> None:
    """Passes: 4 with labels from data, one more for D_own or a teacher's labels."""
    made, store = runs
    for name, cost in [("ct", 4), ("own", 5), ("aux", 4), ("taught", 5), ("warm", 4)]:
        trained, recipe = store.folders[made[name].id].trained, made[name].recipe
        assert trained["outcome"] == "trained" and passes(recipe.factors) == cost
        assert trained["spend"]["images"] == 25_600
        assert trained["spend"]["passes"] == cost * 25_600
        weights = weights_at(store.folders[made[name].id], 1.0, 0.05)
        assert ("head.weight" in weights) == (name != "ct")
    ids = {run.id for run in made.values()}
    assert len(ids) == len(made)  # labels, weights and scores make other runs


@pytest.mark.parametrize("name", ["own", "aux", "taught"])
def test_trained_head_denoises(name: str, runs: tuple[dict[str, Run], Store]) -> None:
    """Distance to the population's D at t = .5, against that of the head at its start."""
    made, store = runs
    run = made[name]
    dataset = worker.load(run.recipe.factors.data, CPU)
    sigma = Sigma(data=store.folders[run.id].trained["sigma_data"])
    x_t = torch.linspace(-1.5, 1.5, 61)[:, None]
    t = torch.full((61,), 0.5)
    net = networks.build(run.recipe.factors.network, (1,), 0.0, 0, "", head=True)

    def error() -> float:
        with torch.no_grad():
            D = denoised(net(scaled(x_t, t, sigma), t.log() / 4, None, True)[1], x_t, t, sigma)
        return (D - dataset.density.denoiser(x_t, t)).square().mean().sqrt().item()

    first = error()
    net.load_state_dict(weights_at(store.folders[run.id], 1.0, 0.05))
    assert error() < first / 2


def test_first_weights_of_a_run_from_another(runs: tuple[dict[str, Run], Store]) -> None:
    """From a run without a head the head stays at its start; from one with, it comes along; a
    student without one takes the rest."""
    made, store = runs
    sources = {run.id: run for run in made.values()}
    dataset = worker.load(made["ct"].recipe.factors.data, CPU)

    def first(name: str) -> dict[str, Tensor]:
        net = initial(made[name], sources, store.folders.__getitem__, dataset)
        return dict(net.state_dict())

    edm, aux = (weights_at(store.folders[made[n].id], 1.0, 0.05) for n in ("edm", "aux_first"))
    zero = {n: torch.zeros_like(aux[n]) for n in HEAD}
    assert aux["head.weight"].abs().max() > 0 and set(HEAD).isdisjoint(edm)
    assert same(first("warm"), edm | zero)
    assert same(first("again"), aux)
    assert same(first("bare"), {n: w for n, w in aux.items() if n not in HEAD})


def test_sources_train_under_a_base_with_a_head(tmp_path: Path) -> None:
    text = replaced("  batch: 64", "  batch: 64\n  auxiliary: denoising_head")
    made, store = done(tmp_path, text)
    assert "head.weight" not in weights_at(store.folders[made["edm"].id], 1.0, 0.05)
    assert "head.weight" in weights_at(store.folders[made["cd"].id], 1.0, 0.05)


# --- what a run carries from update to update ---


OWN = "score: {kind: own, mu: 0.5, ramp: 0.3}, auxiliary: denoising_head"


@pytest.mark.parametrize("change", [
    f"{OWN}, dropout: 0.2",
    f"{OWN}, objective: continuous, target: stopgrad",
    f"{OWN}, target: {{kind: ema, mu: 0.9}}",
    "auxiliary: {kind: denoising_head, labels: {run: edm}}",
    "score: single_sample, repeat: 3",
    "score: {kind: posterior_k, k: 4}",
    "score: {kind: k_sample, n: 32, shared: true}, repeat: 2",
    "score: single_sample, objective: continuous, dropout: 0.2",
    "score: {kind: teacher, run: edm}, objective: continuous, precision: bfloat16",
    "score: single_sample, discretization: ect, distance: l2_norm",
])  # fmt: skip
def test_a_run_stopped_in_its_middle_goes_on_to_the_same_bits(change: str, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, first = trained(tmp_path / "whole", (), ct=change)
    cut, _ = trained(tmp_path / "cut", (), 4, 3, ct=change)
    assert same(cut, whole)
    assert not same(whole[20]["raw"], first) and not same(whole[20]["raw"], whole[10]["raw"])
    assert ("own" in whole[20]) == ("kind: own" in change)
    assert ("head.weight" in whole[20]["raw"]) == ("auxiliary" in change)


def test_own_score_reads_the_average_it_follows(tmp_path: Path) -> None:
    """Half of the way to each new w: w_0 / 2 + w_1 / 2, w_0 / 4 + w_1 / 4 + w_2 / 2. Its ramp
    begins at 0, so that the first update is that of single_sample with the same head."""
    for name in ("own", "plain"):
        (tmp_path / name).mkdir()
    at, w0 = trained(tmp_path / "own", (), ct=OWN)
    w1, w2 = at[1]["raw"], at[2]["raw"]
    close(at[1]["own"], (1 / 2, w0), (1 / 2, w1))
    close(at[2]["own"], (1 / 4, w0), (1 / 4, w1), (1 / 2, w2))
    plain, _ = trained(tmp_path / "plain", (), ct="auxiliary: denoising_head")
    assert same(plain[1]["raw"], w1) and not same(plain[3]["raw"], at[3]["raw"])
