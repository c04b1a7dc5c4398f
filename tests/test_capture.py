"""The step's fast form against the step as it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from study import losses, networks
from study.capture import Captured, begun, compiled, in_rows, step
from study.data import Batch, Draws, load
from study.factors import (
    Adam,
    Analytic,
    Budget,
    Denoising,
    Ema,
    Factors,
    Heun,
    RAdam,
    Sigma,
    UniformGrid,
)
from study.losses import Problem
from study.models import make_optimizer
from study.scores import Knowledge
from study.subjects import Mixture, Mlp

MIXTURE = Mixture(means=((-1.0, 0.0), (1.0, 0.5)), std=0.2)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = {
    "ct": {},
    "heun along the exact score": {"score": Analytic(), "solver": Heun()},
    "averaged target": {"target": Ema(mu=0.9), "law": UniformGrid()},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "denoising": {"objective": Denoising()},
}


def problem(case: str, device: torch.device = CPU) -> Problem:
    """A small problem with dropout, no part of it at zero."""
    factors = Factors(
        data=MIXTURE,
        network=Mlp(width=16, depth=2),
        budget=Budget(images=1),
        dropout=0.2,
        **CASES[case],
    )
    student, average = (
        networks.build(factors.network, (2,), factors.dropout, seed, "", factors.precision)
        for seed in (0, 1)
    )
    for seed, net in enumerate((student, average)):
        nn.init.normal_(net.out.weight, generator=torch.Generator().manual_seed(seed))
        net.to(device)
    density = load(MIXTURE).to(device).density
    return Problem(
        factors,
        Sigma(data=0.7),
        student,
        Knowledge(density=density),
        average=average.requires_grad_(False) if isinstance(factors.target, Ema) else None,
    )


def batch(i: int, n: int = 32, device: torch.device = CPU) -> Batch:
    drawn = Draws(load(MIXTURE), 0, "student", 0)(i * n, n)
    return Batch(*(getattr(drawn, f.name).to(device) for f in fields(Batch)))


# --- a function in pieces of equal size ---


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
@pytest.mark.parametrize(("n", "pieces"), [(1, 1), (5, 1), (8, 1), (9, 2), (16, 2), (29, 4)])
def test_pieces_have_the_compiled_size_and_the_functions_rows(
    shape: tuple[int, ...], n: int, pieces: int
) -> None:
    sizes = []

    def function(x: Tensor, t: Tensor) -> Tensor:
        sizes.append((len(x), len(t)))
        assert (t > 0).all()  # padding is no noise level of its own
        return x * t.log().view(-1, *(1,) * (x.ndim - 1)) + x.flatten(1).sum(1).view(
            -1, *(1,) * (x.ndim - 1)
        )

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *shape, generator=generator)
    t = torch.rand(n, generator=generator) + 0.1
    direct = function(x, t)
    sizes.clear()
    found = in_rows(function, 8, CUDA)(x, t)
    assert sizes == [(8, 8)] * pieces
    assert torch.equal(found, direct)


def test_a_network_in_pieces_gives_the_rows_of_the_whole() -> None:
    net = networks.build(Mlp(width=16, depth=1), (2,), 0.0, 0, "")
    nn.init.normal_(net.out.weight)
    x, t = batch(0, 21).x, torch.linspace(0.1, 3, 21)
    with torch.no_grad():
        torch.testing.assert_close(in_rows(net, 8, CUDA)(x, t), net(x, t))


def test_on_a_cpu_the_function_is_called_as_it_is() -> None:
    def function(x: Tensor, t: Tensor) -> Tensor:
        return x

    assert in_rows(function, 8, CPU) is function


# --- the update ---


def optimizers(net: nn.Module) -> dict[str, torch.optim.Optimizer]:
    made = {"adam": Adam(lr=0.01), "radam": RAdam(lr=0.01)}
    return {name: make_optimizer(kind, net) for name, kind in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_optimisers_along_the_gradient(case: str) -> None:
    one = problem(case)
    weights = list(one.net.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.5)
    update = step(one, optimizer, batch(0))
    update(batch(1), 10, 1.0)  # an update before leaves nothing behind
    expected = one.backward(batch(2), *one.levels(batch(2), 7))
    gradients = [w.grad for w in weights]
    moved = [(w - 0.5 * g).detach() for w, g in zip(weights, gradients, strict=True)]
    loss = update(batch(2), 7, 1.0)
    assert not loss.requires_grad and torch.equal(loss, expected)
    for w, g, at in zip(weights, gradients, moved, strict=True):
        assert torch.equal(w.grad, g)
        torch.testing.assert_close(w, at)
    assert sum(g.abs().sum().item() for g in gradients) > 0


def test_compiled_network_on_a_cpu_is_the_network() -> None:
    net = networks.build(Mlp(width=16, depth=1), (2,), 0.0, 0, "")
    assert compiled(net, CPU) is net and net._compiled_call_impl is None


@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_a_state_made_beforehand_changes_no_update(kind: str) -> None:
    nets = [problem("ct").net for _ in range(2)]
    early, late = (optimizers(net)[kind] for net in nets)
    begun(early)
    assert not late.state and all(s["step"] == 0 for s in early.state.values())
    for i in range(8):  # RAdam's first five updates are of another kind
        for net, optimizer in zip(nets, (early, late), strict=True):
            for j, w in enumerate(net.parameters()):
                w.grad = torch.full_like(w, 0.1 * (i - 2) + 0.01 * j)
            optimizer.step()
        begun(early)  # what has begun is left alone
    for w, v in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(w, v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured step needs a GPU")
@pytest.mark.parametrize("kind", ["adam", "radam"])
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_plain_step(case: str, kind: str) -> None:
    one, plain = problem(case, CUDA), problem(case, CUDA)
    other = optimizers(plain.net)[kind]
    first = [w.detach().clone() for w in one.net.parameters()]
    update = step(one, optimizers(one.net)[kind], batch(0, device=CUDA))
    assert isinstance(update, Captured)
    assert all(map(torch.equal, one.net.parameters(), first))  # nothing moves before the first
    for i, N in [(1, 10), (2, 7), (3, 2), (4, 5), (5, 5), (6, 9), (7, 3)]:
        loss = update(batch(i, device=CUDA), N, 1.0)
        given = batch(i, device=CUDA)
        expected = plain.backward(given, *plain.levels(given, N))
        other.step()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            for w, v in zip(one.net.parameters(), plain.net.parameters(), strict=True):
                torch.testing.assert_close(w.grad, v.grad, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)
                v.copy_(w)  # Adam divides rounding by rounding: it is not to add up


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured step needs a GPU")
@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_a_captured_step_goes_on_from_a_saved_state(kind: str) -> None:
    whole, cut = problem("ct", CUDA), problem("ct", CUDA)
    optimizer = optimizers(whole.net)[kind]
    update = step(whole, optimizer, batch(0, device=CUDA))
    for i in range(8):
        if i == 5:
            cut.net.load_state_dict(whole.net.state_dict())
            again = optimizers(cut.net)[kind]
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed = step(cut, again, batch(0, device=CUDA))
        update(batch(i, device=CUDA), 10, 1.0)
        if i >= 5:
            resumed(batch(i, device=CUDA), 10, 1.0)
    assert all(map(torch.equal, whole.net.parameters(), cut.net.parameters()))


# --- the target's pass beside the student's ---


def test_the_targets_are_aside_and_the_student_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        said.append(f"{name} begins")
        yield
        said.append(f"{name} ends")

    @contextmanager
    def beside(_: Tensor) -> Iterator[object]:
        with noted("block"):
            yield noted("aside")

    def told(name: str, function: Callable) -> Callable:
        return lambda *a, **k: said.append(name) or function(*a, **k)

    monkeypatch.setattr(losses, "beside", beside)
    monkeypatch.setattr(losses, "distance", told("distance", losses.distance))
    one = problem("ct")
    one.net.register_forward_pre_hook(lambda *_: said.append("pass"))
    one.losses(batch(0), 10)
    assert said == ["block begins", "aside begins", "pass", "aside ends", "pass", "block ends",
                    "distance"]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_a_late_target_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one, given = problem("ct", CUDA), batch(0, device=CUDA)
    expected = one.losses(given, 10).mean()
    made = Problem.targets

    def late(*arguments: object) -> list[Tensor]:
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        return [t + 1 for t in made(*arguments)]

    monkeypatch.setattr(Problem, "targets", late)
    found = one.losses(given, 10).mean()
    monkeypatch.setattr(losses, "beside", lambda _: nullcontext(nullcontext()))
    assert torch.equal(found, one.losses(given, 10).mean()) and not torch.equal(found, expected)
