"""Passes per image against the calls that a real loss makes of its networks."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from study import networks
from study.budget import TANGENT, Spend, passes, snapshot_images
from study.consistency import consistency, denoised, denoiser, scaled
from study.continuous import tangent
from study.data import Draws, load, to_float
from study.factors import (
    Analytic,
    Blend,
    Budget,
    Continuous,
    Denoising,
    DenoisingHead,
    Ema,
    Empirical,
    Factors,
    FromRun,
    Frozen,
    Heun,
    KSample,
    Own,
    PosteriorK,
    Sigma,
    SingleSample,
    Teacher,
    Windowed,
)
from study.losses import Problem
from study.meaning import has_head
from study.posterior import Posterior
from study.scores import Knowledge
from study.subjects import Mixture, Mlp, Network, Unet

HEAD, TAUGHT = DenoisingHead(), DenoisingHead(labels=FromRun(run="a"))
A, B = Teacher(run="a"), Teacher(run="b")
BOTH = Windowed(inside=A, outside=B, t_low=0.1, t_high=2.0)
HALF = Windowed(inside=A, outside=PosteriorK(k=4), t_low=0.1, t_high=2.0)
MIXED = Blend(alpha=0.5, beta=0.5, run="a")

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
    "denoising, head ignored": ({"objective": Denoising(), "auxiliary": TAUGHT}, 3),
    "blend": ({"score": MIXED}, 5),
    "posterior_k": ({"score": PosteriorK(k=8)}, 4),
    "k_sample": ({"score": KSample(n=8)}, 4),
    "window": ({"score": HALF}, 5),
    "window, two teachers": ({"score": BOTH}, 6),
    "window, two teachers, heun": ({"score": BOTH, "solver": Heun()}, 8),
    "repeat": ({"repeat": 3}, 6),  # 3 and three targets
    "repeat, averaged target": ({"repeat": 3, "target": Ema(mu=0.9)}, 6),
    "repeat, blend": ({"repeat": 2, "score": MIXED}, 7),
    "repeat, window": ({"repeat": 3, "score": HALF}, 9),
    "repeat, frozen": ({"repeat": 3, "target": Frozen(run="a")}, 4),
    "head": ({"auxiliary": HEAD}, 4),
    "head, teacher's labels": ({"auxiliary": TAUGHT}, 5),
    "head, teacher's labels, teacher": ({"auxiliary": TAUGHT, "score": B}, 6),
    "head, teacher's labels, frozen": ({"auxiliary": TAUGHT, "target": Frozen(run="a")}, 5),
    "own": ({"auxiliary": HEAD, "score": Own()}, 5),
    "own, repeat": ({"auxiliary": HEAD, "score": Own(), "repeat": 2}, 7),
    "continuous": ({"objective": Continuous()}, 5),
    "continuous, teacher": ({"objective": Continuous(), "score": A}, 6),
    "continuous, window": ({"objective": Continuous(), "score": BOTH}, 7),
    "continuous, own": ({"objective": Continuous(), "auxiliary": HEAD, "score": Own()}, 6),
    "continuous, teacher's labels": ({"objective": Continuous(), "auxiliary": TAUGHT}, 6),
    "continuous, rest ignored": (
        {"objective": Continuous(), "repeat": 3, "target": Ema(mu=0.9), "solver": Heun()}, 5),
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
    student, other = (
        networks.build(factors.network, (1,), 0.0, s, "", head=head)
        for s, head in enumerate((has_head(factors), True))
    )
    other.requires_grad_(False)

    def counted(_: nn.Module, __: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        """One for the forward pass, two more when its gradient comes back, through both heads."""
        count.append(1)
        F = output[0] if isinstance(output, tuple) else output
        if F.requires_grad:
            F.register_hook(lambda _: count.append(2))

    for net in (student, other):
        nn.init.normal_(net.out.weight)
        net.register_forward_hook(counted)

    body = student.body

    def differentiated(*arguments: Tensor) -> Tensor:
        """What only the tangent calls; worth two, as counted below."""
        count.append(TANGENT)
        return body(*arguments)

    student.body = differentiated

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(other, x_t, t, sigma)

    def own(x_t: Tensor, t: Tensor) -> Tensor:
        return denoised(other(scaled(x_t, t, sigma), t.log() / 4, None, True)[1], x_t, t, sigma)

    problem = Problem(
        factors,
        sigma,
        student,
        Knowledge(
            teachers={"a": teacher, "b": teacher},
            own=own,
            law=Posterior(to_float(dataset.train)),
            density=dataset.density,
        ),
        lambda x_t, t: consistency(other, x_t, t, sigma),
        other if isinstance(factors.target, Ema) else None,
    )
    problem.losses(Draws(dataset, 0, "student", 0)(0, 16), 10).sum().backward()
    assert sum(count) == passes(factors) == expected
    assert all(p.grad is not None for p in student.parameters())


class Products(TorchDispatchMode):
    """The products of layers that are made, those by a factor of zeros left out: torch multiplies
    by the weights' tangents though they have none."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.idle = 0, 0

    def __torch_dispatch__(
        self, function: object, types: object, arguments: tuple = (), named: dict | None = None
    ) -> object:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "convolution"):
            a, b = arguments[1:3] if name == "addmm" else arguments[:2]
            idle = not (a.any() and b.any())
            self.idle, self.made = self.idle + idle, self.made + (not idle)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("kind", "shape"), [(Mlp(width=8, depth=2), (3,)), (Unet(width=8), (1, 4, 4))], ids=str
)
def test_a_tangent_is_worth_two_passes(kind: Network, shape: tuple[int, ...]) -> None:
    net = networks.build(kind, shape, 0.0, 0, "").requires_grad_(False)
    nn.init.normal_(net.out.weight)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, *shape, generator=generator), torch.rand(4, generator=generator) + 0.1
    with Products() as forward:
        net(x, t.log() / 4)
    with Products() as both:
        tangent(net, x, t, 0 * x, Sigma(data=1.0), None, 1.0)
    assert both.made == TANGENT * forward.made > 5
    assert forward.idle == 0 and both.idle <= forward.made  # which `flops` counts and passes don't


def test_spend_adds_up() -> None:
    spend = Spend()
    for _ in range(3):
        spend = spend.plus(128, 5, 1e6, 0.5)
    assert spend == Spend(images=384, updates=3, passes=1920.0, flops=3e6, seconds=1.5)


def test_snapshots_fall_on_whole_batches_and_never_before_the_first() -> None:
    assert snapshot_images(1280, 64, {0.5, 1.0}) == {640: 0.5, 1280: 1.0}
    assert snapshot_images(1280, 64, {0.01, 0.33, 1.0}) == {64: 0.01, 448: 0.33, 1280: 1.0}
