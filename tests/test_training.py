"""Averaged targets and optimisers in real runs, against weights worked out from the snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from studies import TWO_MODES, read, replaced
from torch import Tensor, nn

from study import worker
from study.data import load
from study.errors import StudyError
from study.factors import Adam, RAdam
from study.instruments import problem_at
from study.models import initial, make_optimizer
from study.spec import Run
from study.store import Store, read_lines
from study.student import second_moment
from study.train import set_up, train
from study.weights import load_tensors, snapshot_name

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = [
    CPU,
    pytest.param(
        CUDA, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
UPDATES = {1: 0.05, 2: 0.1, 3: 0.15, 10: 0.5, 20: 1.0}  # snapshots of 20 updates


def trained(
    folder: Path,
    sets: tuple[str, ...],
    *stops: int,
    ct: str = "score: single_sample",
    device: torch.device = CPU,
) -> tuple[dict[int, Any], dict[str, Tensor]]:
    """Snapshots by update, and the first weights, of CT with other base factors or keys of its
    own, stopped and resumed after each number of updates in `stops`; its sources come first."""
    text = replaced("at: [0.5, 1.0]", f"at: {list(UPDATES.values())}")
    text = text.replace("ct: {score: single_sample}", f"ct: {{{ct}}}")
    study = read(folder, text, (*(f"base.{s}" for s in sets), "seeds=[0]"))
    store = Store(folder / "results", study)
    run: Run = next(r for r in study.runs if r.recipe.name == "ct")
    for source in run.refs.values():
        worker.work(study.unique[source], study.unique, store.folders, "cpu")
    own = store.folders[run.id]
    own.create(run, {"id": run.id})
    worker.set_up()
    dataset = worker.load(run.recipe.factors.data, device)
    for stop in (*stops, None):
        steps = iter(range(1, 1000))
        ended = train(run, study.unique, store.folders.__getitem__, dataset, device,
                      lambda stop=stop, steps=steps: next(steps) == stop, {})  # fmt: skip
        assert ended == (stop is None) and own.file("state.pt").exists() == (not ended)
    assert [row["step"] for row in read_lines(own.file("steps.jsonl"))] == list(range(1, 21))
    first = initial(run, study.unique, store.folders.__getitem__, dataset).state_dict()
    files = {n: load_tensors(own.file(snapshot_name(at))) for n, at in UPDATES.items()}
    return files, first


def close(found: dict[str, Tensor], *parts: tuple[float, dict[str, Tensor]]) -> None:
    """The weights are this sum of weights."""
    assert sum(share for share, _ in parts) == pytest.approx(1)
    for name, value in found.items():
        expected = sum(share * weights[name].double() for share, weights in parts)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)


def same(one: object, other: object) -> bool:
    """Equal trees of tensors, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one is other is None


# --- the averaged target ---


@pytest.mark.parametrize("target", [
    "{kind: ema, mu: 0.5}",
    "{kind: ema, mu: 0.25, s0: 5}",  # at N = 10: .25^(5 / 10)
])  # fmt: skip
def test_target_is_the_average_of_the_weights_it_followed(target: str, tmp_path: Path) -> None:
    """From w_0 on, half of the way to each new w: (w_0 + w_1) / 2, w_0 / 4 + w_1 / 4 + w_2 / 2."""
    at, w0 = trained(tmp_path, (f"target={target}",))
    w1, w2, w3 = (at[n]["raw"] for n in (1, 2, 3))
    assert not same(w0, w1)
    close(at[1]["target"], (1 / 2, w0), (1 / 2, w1))
    close(at[2]["target"], (1 / 4, w0), (1 / 4, w1), (1 / 2, w2))
    close(at[3]["target"], (1 / 8, w0), (1 / 8, w1), (1 / 4, w2), (1 / 2, w3))


def test_targets_decay_is_that_of_the_updates_own_n(tmp_path: Path) -> None:
    """s0 = 2, s1 = 4: N = 2, then 3 (sqrt(4 + 21 / 20) = 2.2); mu = .5, then .5^(2/3) = .63."""
    schedule = "discretization={kind: progressive, s0: 2, s1: 4}"
    at, w0 = trained(tmp_path, ("target={kind: ema, mu: 0.5, s0: 2}", schedule))
    w1, w2 = at[1]["raw"], at[2]["raw"]
    close(at[1]["target"], (0.5, w0), (0.5, w1))
    close(at[2]["target"], (0.31498026, w0), (0.31498026, w1), (0.37003948, w2))


def test_target_begins_as_the_student(tmp_path: Path) -> None:
    """The first update is that of `stopgrad`, the later ones are not."""
    slow, _ = trained(tmp_path, ("target={kind: ema, mu: 0.9}",))
    (tmp_path / "plain").mkdir()
    plain, _ = trained(tmp_path / "plain", ("target=stopgrad",))
    assert "target" not in plain[1]
    assert same(slow[1]["raw"], plain[1]["raw"]) and not same(slow[3]["raw"], plain[3]["raw"])


# --- resuming ---


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("change", [
    "target={kind: ema, mu: 0.9}",
    "target={kind: ema, mu: 0.9, s0: 2}",
    "optimizer={kind: radam, lr: 1e-2}",
    "precision=bfloat16",
    "precision=float16",
    "law=uniform_grid",
])  # fmt: skip
def test_a_run_stopped_in_its_middle_goes_on_to_the_same_bits(
    change: str, device: torch.device, tmp_path: Path
) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, first = trained(tmp_path / "whole", (change,), device=device)
    # within RAdam's first updates, and after
    cut, _ = trained(tmp_path / "cut", (change,), 4, 3, device=device)
    assert same(cut, whole)
    assert not same(whole[20]["raw"], first) and not same(whole[20]["raw"], whole[10]["raw"])
    assert ("target" in whole[20]) == ("target" in change)
    assert all(v.dtype == torch.float32 for v in whole[20]["raw"].values())


# --- optimisers ---


def moves(optimizer: torch.optim.Optimizer, w: nn.Parameter, gradients: list[float]) -> list:
    """How far down each gradient in turn takes a weight."""
    result = []
    for g in gradients:
        before = w.item()
        w.grad = torch.full_like(w, g)
        optimizer.step()
        result.append(before - w.item())
    return result


def one_weight() -> tuple[nn.Module, nn.Parameter]:
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return net, net.w


def test_radam_is_sgd_with_momentum_for_five_updates_and_then_rectified() -> None:
    """A constant gradient g: the mean of gradients is g, so five steps of lr g. At update 6
    rho = 1999 - 12 .999^6 / (1 - .999^6) = 5.994, and the step is lr sign(g) times
    sqrt(1.994 * 3.994 * 1999 / (1995 * 1997 * 5.994)) = .0258."""
    net, w = one_weight()
    found = moves(make_optimizer(RAdam(lr=0.1), net), w, [3.0] * 6)
    assert found[:5] == pytest.approx([0.3] * 5, rel=1e-6)
    assert found[5] == pytest.approx(0.00258, rel=2e-3)
    net, w = one_weight()  # mean of (1, 0) at decays (.9, 1): .09 / .19
    found = moves(make_optimizer(RAdam(lr=0.1), net), w, [1.0, 0.0])
    assert found == pytest.approx([0.1, 0.1 * 0.09 / 0.19], rel=1e-6)


def test_optimizers_have_the_factors_settings() -> None:
    net, w = one_weight()
    for kind, made in [(RAdam, torch.optim.RAdam), (Adam, torch.optim.Adam)]:
        optimizer = make_optimizer(kind(lr=3e-4, betas=(0.8, 0.95), eps=1e-6), net)
        assert type(optimizer) is made
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == 0 and group["params"] == [w]
    net, w = one_weight()  # Adam's first step is lr whatever the gradient
    assert moves(make_optimizer(Adam(lr=0.1), net), w, [3.0]) == pytest.approx([0.1])


def test_the_second_moment_is_adams_without_its_bias() -> None:
    net, w = one_weight()
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    for gradient in (3.0, 1.0):
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    (moment,) = second_moment(optimizer, dict(net.named_parameters())).values()
    # (0.99 * 9 + 1) * 0.01 / (1 - 0.99^2)
    torch.testing.assert_close(moment, torch.full_like(moment, (0.99 * 9 + 1) / 1.99))


def test_a_probe_reads_the_target_that_trained_beside_the_weights(tmp_path: Path) -> None:
    """At the last weights the loss along the probe is that of training's own problem."""
    study = read(tmp_path, TWO_MODES, ("variants.ct.target={kind: ema, mu: 0.99}",))
    run = next(r for r in study.runs if r.recipe.name == "ct")
    store = Store(tmp_path, study)
    folder = store.folders[run.id]
    folder.file("snapshots").mkdir(parents=True)
    set_up()
    dataset, lookup = load(run.recipe.factors.data), store.folders.__getitem__
    device = torch.device("cpu")
    assert train(run, study.unique, lookup, dataset, device, lambda: False, {})
    problem, moment = problem_at(run, study.unique, lookup, dataset, device, 1.0, {})
    state = torch.load(folder.file("snapshots/1.000.pt"), weights_only=True)
    for kept, net in (("raw", problem.net), ("target", problem.average)):
        assert all(torch.equal(state[kept][k], w) for k, w in net.state_dict().items())
    assert not torch.equal(state["raw"]["out.weight"], state["target"]["out.weight"])
    assert moment.keys() == dict(problem.net.named_parameters()).keys()


# --- runs of no images ---


def test_a_run_of_no_images_is_its_initial_weights(tmp_path: Path) -> None:
    """A copy of a source is its first average in every set of weights, and costs nothing."""
    text = replaced(
        "  ct: {score", "  copy: {init: {run: edm}, budget: {images: 0}, batch: 32}\n  ct: {score"
    )
    study = read(tmp_path, text)
    store = Store(tmp_path / "results", study)
    edm, copy = (
        next(r for r in study.runs if (r.recipe.name, r.seed) == (name, 0))
        for name in ("edm", "copy")
    )
    for run in (edm, copy):
        assert worker.work(run, study.unique, store.folders, "cpu") == worker.DONE
    trained = store.folders[copy.id].trained
    assert not any(trained["spend"].values()) and [s["at"] for s in trained["snapshots"]] == [1.0]
    first = str(copy.recipe.factors.weights_ema[0])
    source, own = (
        load_tensors(store.folders[r.id].file(snapshot_name(1.0))) for r in (edm, copy)
    )
    assert all(same(own["ema"][length], source["ema"][first]) for length in own["ema"])
    assert same(own["raw"], source["ema"][first]) and not same(own["raw"], source["raw"])
    assert {m.at for m in copy.measures} == {1.0}


def test_what_an_untrained_run_never_reads_is_not_in_its_id(tmp_path: Path) -> None:
    copies = """\
  a: {init: {run: edm}, budget: {images: 0}}
  b: {init: {run: edm}, budget: {images: 0}, batch: 32, distance: l2, score: empirical}
  c: {init: {run: edm}, budget: {images: 0}, sigma.max: 40.0}
  ct: {score"""
    study = read(tmp_path, replaced("  ct: {score", copies).replace("{objective: denoising}", (
        "{objective: denoising}\n  low: {from: edm, sigma.max: 40.0}")).replace(
        "c: {init: {run: edm}", "c: {init: {run: low}"))  # fmt: skip
    ids = {r.recipe.name: r.id for r in study.runs if r.seed == 0}
    assert ids["a"] == ids["b"] != ids["c"]


def test_no_images_and_random_weights_are_refused(tmp_path: Path) -> None:
    text = replaced("  ct: {score", "  none: {budget: {images: 0}}\n  ct: {score")
    with pytest.raises(StudyError, match=r"variants\.none\.budget: no images, and random"):
        read(tmp_path, text)
