"""Passes per image against the calls that a real loss makes of its networks."""

import pytest
from torch import Tensor, nn

from study import networks
from study.budget import Spend, passes, snapshot_images
from study.consistency import consistency, denoiser
from study.losses import Problem
from study.data import Draws, load, to_float
from study.factors import (
    Analytic,
    Budget,
    Denoising,
    Ema,
    Empirical,
    Factors,
    Frozen,
    Heun,
    Mixture,
    Mlp,
    Sigma,
    SingleSample,
    Teacher,
)
from study.posterior import Posterior
from study.scores import Knowledge

CASES = {
    "single_sample": ({"score": SingleSample()}, 4),
    "teacher": ({"score": Teacher(run="a")}, 5),
    "empirical": ({"score": Empirical()}, 4),
    "analytic": ({"score": Analytic()}, 4),
    "averaged target": ({"target": Ema(mu=0.9)}, 4),
    "averaged target, teacher": ({"target": Ema(mu=0.9), "score": Teacher(run="a")}, 5),
    "heun, analytic": ({"score": Analytic(), "solver": Heun()}, 4),
    "heun, teacher": ({"score": Teacher(run="a"), "solver": Heun()}, 6),
    "frozen": ({"target": Frozen(run="a")}, 4),
    "frozen, score ignored": ({"target": Frozen(run="a"), "score": Teacher(run="a")}, 4),
    "denoising": ({"objective": Denoising()}, 3),
    "denoising, rest ignored": (
        {"objective": Denoising(), "score": Teacher(run="a"), "target": Frozen(run="a")}, 3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_passes_are_the_calls_made(case: str) -> None:
    changes, expected = CASES[case]
    factors = Factors(
        data=Mixture(means=((-1.0,), (1.0,)), std=0.1, samples=100),
        network=Mlp(width=8, depth=1),
        budget=Budget(images=1),
        **changes,
    )
    dataset, sigma, count = load(factors.data), Sigma(data=1.0), []
    student, other = (networks.build(factors.network, (1,), 0.0, s, "") for s in range(2))
    other.requires_grad_(False)

    def counted(_: nn.Module, __: tuple, output: Tensor) -> None:
        """One for the forward pass, two more when its gradient comes back."""
        count.append(1)
        if output.requires_grad:
            output.register_hook(lambda _: count.append(2))

    for net in (student, other):
        nn.init.normal_(net.out.weight)
        net.register_forward_hook(counted)

    problem = Problem(
        factors,
        sigma,
        student,
        Knowledge(
            teachers={"a": lambda x_t, t: denoiser(other, x_t, t, sigma)},
            law=Posterior(to_float(dataset.train)),
            density=dataset.density,
        ),
        lambda x_t, t: consistency(other, x_t, t, sigma),
        other if isinstance(factors.target, Ema) else None,
    )
    problem.loss(Draws(dataset, 0, "student", 0)(0, 16), 10).backward()
    assert sum(count) == passes(factors) == expected
    assert all(p.grad is not None for p in student.parameters())


def test_spend_adds_up() -> None:
    spend = Spend()
    for _ in range(3):
        spend = spend.plus(128, 5, 1e6, 0.5)
    assert spend == Spend(images=384, updates=3, passes=1920.0, flops=3e6, seconds=1.5)


def test_snapshots_fall_on_whole_batches_and_never_before_the_first() -> None:
    assert snapshot_images(1280, 64, {0.5, 1.0}) == {640: 0.5, 1280: 1.0}
    assert snapshot_images(1280, 64, {0.01, 0.33, 1.0}) == {64: 0.01, 448: 0.33, 1280: 1.0}
