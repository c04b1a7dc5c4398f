"""Models and losses against closed forms, the optimal Gaussian denoiser and exact recursions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from study import consistency, networks, schedules
from study.consistency import distance, solver_step, weight
from study.data import Batch
from study.factors import (
    L1,
    L2,
    Analytic,
    Budget,
    Denoising,
    Edm,
    Ema,
    Euler,
    Factors,
    Fixed,
    Frozen,
    Heun,
    InverseStep,
    L2Norm,
    PseudoHuber,
    Sigma,
    SingleSample,
    Solver,
    Teacher,
    Uniform,
)
from study.losses import Problem
from study.mixtures import GaussianMixture
from study.scores import Knowledge
from study.subjects import Mixture, Mlp, Unet

SIGMA = Sigma(data=0.5)
GAUSS = GaussianMixture.from_lists([[0.0]], [0.5], [1.0], torch.float64)
TWO_MODES = GaussianMixture.from_lists([[-1.0], [1.0]], [0.05, 0.05], [1, 1], torch.float64)


def factors(**changes: object) -> Factors:
    plain = {"data": Mixture(means=((0.0,),), std=0.5), "network": Mlp(), "distance": L2()}
    return Factors(**plain | {"budget": Budget(images=1)} | changes)


class Net(nn.Module):
    """F of a plain function of (x, c_noise), which also writes down how it was called."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        self.calls.append((x, c_noise, key, torch.is_grad_enabled()))
        return self.function(x, c_noise)


def constant(value: float) -> Net:
    return Net(lambda x, _: torch.full_like(x, value))


def batch(mixture: GaussianMixture, n: int, seed: int = 0, u: float | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = mixture.sample(n, generator)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    drawn = torch.rand(n, generator=generator, dtype=torch.float64)
    return Batch(
        x, z, drawn if u is None else torch.full_like(drawn, u), torch.tensor(77), torch.tensor(78)
    )


def z_score(rows: Tensor) -> float:
    """The mean of the rows in standard errors."""
    return (rows.mean() / (rows.std() / math.sqrt(len(rows)))).item()


# --- preconditioning ---


@pytest.mark.parametrize("s", [*np.linspace(0.2, 1.4, 41), 0.7512345678])
def test_consistency_model_at_sigma_min_is_the_identity_bit_for_bit(s: float) -> None:
    net = networks.build(Mlp(width=16, depth=1), (6,), 0.0, 0, "student")
    nn.init.normal_(net.out.weight)
    x = 3 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 0.002)
    sigma = Sigma(data=float(s))
    assert torch.equal(consistency.consistency(net, x, t, sigma), x)
    assert not torch.equal(consistency.consistency(net, x, 2 * t, sigma), x)


def test_consistency_model_of_images_at_another_sigma_min() -> None:
    net = networks.build(Unet(width=4), (1, 5, 5), 0.0, 0, "student")
    nn.init.normal_(net.out.weight)
    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    sigma = Sigma(min=0.01, data=0.73)
    assert torch.equal(consistency.consistency(net, x, torch.full((3,), 0.01), sigma), x)


@pytest.mark.parametrize("kind", [Mlp(width=16, depth=1), Unet(width=4)], ids=str)
def test_consistency_model_in_bfloat16_is_the_identity_at_sigma_min_too(
    kind: Mlp | Unet,
) -> None:
    net = networks.build(kind, (1, 5, 5), 0.0, 0, "student", "bfloat16")
    nn.init.normal_(net.out.weight)
    x = 3 * torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), 0.002)
    assert torch.equal(consistency.consistency(net, x, t, SIGMA), x)
    assert not torch.equal(consistency.consistency(net, x, 2 * t, SIGMA), x)


def test_consistency_models_coefficients() -> None:
    """s = 0.5, t = 1.002: c_skip = .25 / 1.25, c_out = .5 / sqrt(.25 + 1.004004)."""
    t, x = torch.tensor([1.002]), torch.tensor([[3.0]])
    skip = consistency.consistency(constant(0), x, t, SIGMA) / 3
    out = consistency.consistency(constant(1), 0 * x, t, SIGMA)
    assert skip.item() == pytest.approx(0.2, rel=1e-6)
    assert out.item() == pytest.approx(0.446496, rel=1e-5)


@pytest.mark.parametrize("t", [0.002, 0.3, 5.0, 80.0])
@pytest.mark.parametrize("model", [consistency.denoiser, consistency.consistency])
def test_networks_input_has_unit_variance_and_label_is_a_quarter_log(
    model: Callable, t: float
) -> None:
    s, net, level = 0.7, constant(0), torch.tensor([t])
    model(net, torch.tensor([[math.sqrt(s**2 + t**2)]]), level, Sigma(data=s))
    x, c_noise, *_ = net.calls[0]
    assert x.item() == pytest.approx(1.0, rel=1e-6)  # an input one standard deviation out
    assert math.exp(4 * c_noise.item()) == pytest.approx(t, rel=1e-5)


@pytest.mark.parametrize("t", [0.002, 0.3, 5.0, 80.0])
def test_denoisers_coefficients_follow_edms_principles(t: float) -> None:
    """c_skip makes Var[x - c_skip x_t] smallest, and c_out^2 is that variance."""
    s, level = 0.7, torch.tensor([t], dtype=torch.float64)
    one = torch.ones(1, 1).double()
    skip = consistency.denoiser(constant(0), one, level, Sigma(data=s)).item()
    out = consistency.denoiser(constant(1), 0 * one, level, Sigma(data=s)).item()

    def variance(c: float) -> float:
        return (s * (1 - c)) ** 2 + (t * c) ** 2

    assert out**2 == pytest.approx(variance(skip), rel=1e-9)
    h = 1e-4 * skip
    assert variance(skip) < min(variance(skip + h), variance(skip - h))


@pytest.mark.parametrize("t", [0.002, 0.1, 1.0, 80.0])
def test_the_gaussian_denoiser_is_reached_by_its_network(t: float) -> None:
    """N(m, s^2) with s not sigma_data: the F that EDM's appendix B.6 asks for gives E[x | x_t]."""
    m, s, data = 0.4, 1.3, 0.5

    def function(scaled: Tensor, c_noise: Tensor) -> Tensor:
        t = torch.exp(4 * c_noise)[:, None]
        total = torch.sqrt(t**2 + data**2)
        best = m + s**2 / (s**2 + t**2) * (scaled * total - m)
        return (best - data**2 / total * scaled) * total / (t * data)

    x_t = torch.linspace(-3, 3, 9, dtype=torch.float64)[:, None] * (1 + t)
    D = consistency.denoiser(Net(function), x_t, torch.full((9,), t).double(), Sigma(data=data))
    expected = m + s**2 / (s**2 + t**2) * (x_t - m)
    torch.testing.assert_close(D, expected, rtol=1e-9, atol=1e-9)


# --- solver ---


@pytest.mark.parametrize(("t", "r"), [(0.01, 0.002), (1.0, 0.9), (80.0, 0.002), (80.0, 79.0)])
def test_euler_along_the_clean_image_is_x_plus_r_z(t: float, r: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(100, 3, 4, 4, generator=generator) for _ in range(2))
    t, r = torch.full((100,), t), torch.full((100,), r)
    x_t = x + t[0] * z
    x_r = solver_step(Euler(), lambda y, s: (y - x) / s[0], x_t, t, r)
    scale = torch.finfo(torch.float32).eps * (x.abs() + t[0] * z.abs())
    assert ((x_r - (x + r[0] * z)).abs() < 4 * scale).all()


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 2), (Heun(), 3)])
@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_one_steps_error_shrinks_with_the_solvers_order(
    solver: Solver, order: int, t: float
) -> None:
    """On N(m, s^2) the flow is x -> m + sqrt((s^2 + r^2) / (s^2 + t^2)) (x - m)."""
    m, s = 0.4, 0.7
    mixture = GaussianMixture.from_lists([[m]], [s], [1.0], torch.float64)
    x = torch.tensor([[-3.0], [1.0], [2.5]]).double()

    def error(step: float) -> Tensor:
        start, end = (torch.full_like(x[:, 0], level) for level in (t, t - step))
        found = solver_step(
            solver, lambda y, v: (y - mixture.denoiser(y, v)) / v[:, None], x, start, end
        )
        exact = m + math.sqrt((s**2 + (t - step) ** 2) / (s**2 + t**2)) * (x - m)
        return (found - exact).abs()[:, 0]

    for step in (t / 50, t / 100):
        measured = torch.log2(error(step) / error(step / 2))
        assert measured.tolist() == pytest.approx([order] * 3, abs=0.1)


@pytest.mark.parametrize(("t", "r"), [(0.01, 0.002), (1.0, 0.9), (80.0, 0.002), (80.0, 79.0)])
def test_heun_along_the_clean_image_is_euler(t: float, r: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(100, 3, 4, 4, generator=generator).double() for _ in range(2))
    t, r = torch.full((100,), t).double(), torch.full((100,), r).double()
    x_t, calls = x + t[0] * z, []

    def slope(y: Tensor, s: Tensor) -> Tensor:
        calls.append(s[0].item())
        return (y - x) / s[0]

    euler, heun = (solver_step(solver, slope, x_t, t, r) for solver in (Euler(), Heun()))
    assert calls == [t[0], t[0], r[0]]  # the second slope is the one at the step's end
    tolerance = 1e-15 * (t[0] ** 2 / r[0] + 10).item()  # the second slope's division by r
    torch.testing.assert_close(heun, euler, rtol=0, atol=tolerance)
    torch.testing.assert_close(heun, x + r[0] * z, rtol=0, atol=tolerance)


def composed(mixture: GaussianMixture, x: Tensor, N: int) -> Tensor:
    """Euler-CD's fixed point: the solver's steps from sigma_max down to sigma_min."""
    levels = schedules.karras(torch.arange(N), N, SIGMA)

    def slope(y: Tensor, s: Tensor) -> Tensor:
        return (y - mixture.denoiser(y, s)) / s[:, None]

    for i in range(N - 1, 0, -1):
        t, r = (levels[j].expand(len(x)) for j in (i, i - 1))
        x = solver_step(Euler(), slope, x, t, r)
    return x


@pytest.mark.parametrize(("N", "gain"), [(18, 0.846), (40, 0.930), (150, 0.981), (1280, 0.998)])
def test_gain_of_eulers_chain_on_a_gaussian(N: int, gain: float) -> None:
    """The gain of N - 1 Euler steps relative to the flow's sqrt((s^2 + e^2) / (s^2 + T^2))."""
    flow = math.sqrt((0.25 + SIGMA.min**2) / (0.25 + SIGMA.max**2))
    found = composed(GAUSS, torch.ones(1, 1).double(), N).item() / flow
    assert found == pytest.approx(gain, abs=5e-4)


@pytest.mark.parametrize(("N", "w2", "mid"), [(18, 0.0258, 0.0144), (40, 0.0101, 0.0024)])
def test_eulers_chain_on_two_modes(N: int, w2: float, mid: float) -> None:
    """Carried along quantiles: W2 to the data at sigma_min, and the mass with |y| < 0.8."""
    q = (np.arange(20_000) + 0.5) / 20_000
    start = torch.from_numpy(SIGMA.max * stats.norm.ppf(q))[:, None]
    y = np.sort(composed(TWO_MODES, start, N)[:, 0].numpy())
    grid, s = np.linspace(-1.5, 1.5, 200_001), math.hypot(0.05, SIGMA.min)
    cdf = (stats.norm.cdf(grid, -1, s) + stats.norm.cdf(grid, 1, s)) / 2
    assert np.sqrt(np.mean((y - np.interp(q, cdf, grid)) ** 2)) == pytest.approx(w2, rel=0.01)
    assert np.mean(np.abs(y) < 0.8) == pytest.approx(mid, abs=1e-4)


# --- distances and weights ---


def test_pseudo_huber_is_stable_from_tiny_to_huge() -> None:
    d, size = 12, torch.logspace(-9, 3, 60, dtype=torch.float64)
    direction = torch.randn(60, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    a = size.view(-1, 1, 1, 1) * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    c = 0.00054 * math.sqrt(d)
    square = a.flatten(1).square().sum(1).numpy().astype(np.longdouble)
    expected = np.sqrt(square + np.longdouble(c) ** 2) - np.longdouble(c)
    far = size.numpy() > 1e-6  # below, the plain form itself cancels in extended precision
    found = distance(PseudoHuber(), a.float(), torch.zeros_like(a).float()).double().numpy()
    assert found[far] == pytest.approx(expected[far].astype(float), rel=2e-6)
    assert found[~far] == pytest.approx(size.numpy()[~far] ** 2 / (2 * c), rel=1e-5)


def test_pseudo_huber_on_cifars_dimension() -> None:
    """d = 3072: c = 0.0299, and |a - b| = c gives (sqrt 2 - 1) c."""
    a = torch.zeros(1, 3, 32, 32).double()
    a[0, 1, 2, 3] = 0.00054 * math.sqrt(3072)
    expected = 0.4142136 * 0.0299299
    assert distance(PseudoHuber(), a, 0 * a).item() == pytest.approx(expected, rel=1e-5)


def test_pseudo_hubers_gradient_is_zero_at_zero_and_one_far_away() -> None:
    a = torch.zeros(3, 4)
    a[1, 2], a[2, 0] = 1e-12, 1e4
    a.requires_grad_()
    distance(PseudoHuber(), a, torch.zeros(3, 4)).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad[0].abs().max() == 0
    assert a.grad[2].norm().item() == pytest.approx(1.0, rel=1e-5)


def test_l2_is_the_mean_over_dimensions() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([3.0, 4.0]).repeat(2, 1, 2, 1)
    assert distance(L2(), a, b).tolist() == [12.5, 12.5]


def test_distances_in_numbers() -> None:
    """Apart by (3, 4, 0, 0): sum |.| = 7, the length 5, its square 25. c0 = 6 gives c = 12 and
    sqrt(25 + 144) - 12 = 1. A second row lies at its target."""
    a, b = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 1, 2, 2).double()
    a[0, 0, 0], b[0, 0, 0, 1] = torch.tensor([3.0, 1.0]), -3.0
    for kind, expected in [(L1(), 1.75), (L2Norm(), 5.0), (L2(), 6.25), (PseudoHuber(c0=6), 1.0)]:
        assert distance(kind, a, b).tolist() == pytest.approx([expected, 0.0], rel=1e-12)
        assert distance(kind, b, a).tolist() == pytest.approx([expected, 0.0], rel=1e-12)


def test_pseudo_huber_lies_between_the_norm_and_its_square() -> None:
    """sqrt(u^2 + c^2) - c is u - c + c^2 / 2u for c << u, and u^2 / 2c - u^4 / 8c^3 for c >> u."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 3, 4, 4, generator=generator, dtype=torch.float64)
    norm, root = distance(L2Norm(), a, b), 48**0.5
    torch.testing.assert_close(norm, (a - b).flatten(1).norm(dim=1))
    small = distance(PseudoHuber(c0=1e-6), a, b)
    torch.testing.assert_close(small, norm - 1e-6 * root, rtol=1e-10, atol=0)
    c = 1e4 * root
    large = distance(PseudoHuber(c0=1e4), a, b)
    torch.testing.assert_close(large, norm**2 / (2 * c), rtol=1e-7, atol=0)
    torch.testing.assert_close(large, distance(L2(), a, b) * 48 / (2 * c), rtol=1e-7, atol=0)


def test_gradients_of_the_norms() -> None:
    """l2_norm's is the unit vector, and 0 where a = b, not nan; l1's the signs over d."""
    a = torch.tensor([[3.0, -4.0, 0.0], [1.0, 1.0, 1.0], [1e-30, 0.0, 0.0]])
    b = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    a.requires_grad_()
    distance(L2Norm(), a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad[0].tolist() == pytest.approx([0.6, -0.8, 0.0])
    assert a.grad[1].tolist() == [0.0, 0.0, 0.0]
    a.grad = None
    distance(L1(), a, b).sum().backward()
    third = 1 / 3
    assert a.grad[:2].flatten().tolist() == pytest.approx([third, -third, 0.0, 0.0, 0.0, 0.0])


def test_edms_weight() -> None:
    """(t^2 + s^2) / (t s)^2 at s = .5: t = .5: .5 / .0625 = 8; t = 1: 1.25 / .25 = 5; far away
    1 / s^2 = 4; at t = .002: .250004 / 1e-6. It is 1 / c_out^2, so EDM's loss is one of F."""
    t = torch.tensor([0.5, 1.0, 1e4, 0.002])
    found = weight(Edm(), t, 0 * t, SIGMA)
    assert found.tolist() == pytest.approx([8.0, 5.0, 4.0, 250_004.0], rel=1e-6)
    ones, zeros = torch.ones(4, 1), torch.zeros(4, 1)
    c_out = consistency.denoised(ones, zeros, t, SIGMA)[:, 0]
    torch.testing.assert_close(found * c_out.square(), torch.ones(4))


def test_weights() -> None:
    t, r = torch.tensor([1.0, 80.0]), torch.tensor([0.75, 30.0])
    assert weight(InverseStep(), t, r, SIGMA).tolist() == pytest.approx([4.0, 0.02])
    assert weight(Uniform(), t, r, SIGMA).tolist() == [1.0, 1.0]


# --- the consistency loss ---


def points(net: Net) -> list[tuple[Tensor, Tensor]]:
    """(x, t) of the network's calls, the input scaling undone."""
    result = []
    for x, c_noise, *_ in net.calls:
        t = torch.exp(4 * c_noise)
        result.append((x * (t[:, None] ** 2 + SIGMA.data**2).sqrt(), t))
    return result


def test_consistency_training_meets_x_plus_r_z_and_x_plus_t_z() -> None:
    b, net = batch(GAUSS, 200), constant(0)
    Problem(factors(), SIGMA, net).losses(b, 20)
    (x_r, r), (x_t, t) = points(net)
    grid = schedules.karras(torch.arange(20), 20, SIGMA)
    place = torch.cdist(r[:, None].double(), grid[:, None]).argmin(1)
    torch.testing.assert_close(r.double(), grid[place], rtol=1e-5, atol=0)
    torch.testing.assert_close(t.double(), grid[place + 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(x_t, b.x + t[:, None] * b.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_r, b.x + r[:, None] * b.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["analytic", "teacher"])
def test_distillation_on_a_gaussian_meets_the_straight_line_of_its_flow(source: str) -> None:
    """dx/dt = t x / (s^2 + t^2) on N(0, s^2): x_r = x_t (1 + (r - t) t / (s^2 + t^2))."""
    known, score = {
        "analytic": (Knowledge(density=GAUSS), Analytic()),
        "teacher": (Knowledge(teachers={"edm": GAUSS.denoiser}), Teacher(run="edm")),
    }[source]
    b, net = batch(GAUSS, 200), constant(0)
    Problem(factors(score=score), SIGMA, net, known).losses(b, 20)
    (x_r, r), (x_t, t) = points(net)
    expected = x_t * (1 + (r - t) * t / (0.25 + t**2))[:, None]
    torch.testing.assert_close(x_t, b.x + t[:, None] * b.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_r, expected, rtol=1e-4, atol=1e-4)


def test_distillation_with_heun_meets_the_flow_closer_than_with_euler() -> None:
    """x_r on N(0, s^2) against sqrt((s^2 + r^2) / (s^2 + t^2)) x_t, in the loss itself."""
    errors, b = [], batch(GAUSS, 500)
    for solver in (Euler(), Heun()):
        net = constant(0)
        drawn = factors(score=Analytic(), solver=solver)
        Problem(drawn, SIGMA, net, Knowledge(density=GAUSS)).losses(b, 60)
        (x_r, r), (x_t, t) = points(net)
        exact = ((0.25 + r**2) / (0.25 + t**2)).sqrt()[:, None] * x_t
        errors.append((x_r - exact).abs().mean().item())
    assert errors[1] < errors[0] / 10


def test_averaged_target_is_read_in_the_students_place() -> None:
    b, student, average = batch(GAUSS, 100), constant(0.3), constant(0.7)
    drawn = factors(target=Ema(mu=0.9), weighting=Uniform())
    problem = Problem(drawn, SIGMA, student, average=average)
    found = problem.losses(b, 20)
    assert len(student.calls) == len(average.calls) == 1
    assert student.calls[0][2] is b.mask and average.calls[0][2] is b.mask  # one dropout mask
    assert (student.calls[0][3], average.calls[0][3]) == (True, False)
    r, t = schedules.pair(Fixed(N=20), drawn.law, b.u, 20, SIGMA)
    ends = [
        consistency.consistency(constant(F), b.x + level[:, None] * b.z, level, SIGMA)
        for F, level in ((0.3, t), (0.7, r))
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1])[:, 0] ** 2, rtol=1e-4, atol=1e-8)
    own = Problem(drawn, SIGMA, constant(0.3)).losses(b, 20)
    assert (found - own).abs().max() > 0.01


def test_target_has_the_students_mask_and_no_gradient() -> None:
    net, b = constant(0), batch(GAUSS, 4)
    Problem(factors(), SIGMA, net).losses(b, 20)
    target, student = net.calls
    assert target[2] is b.mask and student[2] is b.mask
    assert (target[3], student[3]) == (False, True)


def test_gradient_is_the_students_alone() -> None:
    """f(x, t) = x + a at both levels: through both of them the gradient would be 0."""
    a = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sigma = Sigma(min=60.0, max=80.0, data=1e6)  # so c_skip = 1 and c_out = t - 60
    net = Net(lambda x, c_noise: a / (torch.exp(4 * c_noise)[:, None] - 60) + 0 * x)
    problem, b = Problem(factors(weighting=Uniform()), sigma, net), batch(GAUSS, 5, u=0.999)
    r, t = schedules.pair(Fixed(N=20), problem.factors.law, b.u, 3, sigma)
    assert r.min() > 60  # where r = sigma_min the target has no parameters
    loss, gap = problem.losses(b, 3), (t - r).double() * b.z[:, 0]
    torch.testing.assert_close(loss.detach(), gap**2, rtol=1e-3, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(a.grad, 2 * gap.sum()[None], rtol=1e-3, atol=0)


def test_masks_shared_at_neighbouring_levels_cancel() -> None:
    """As r -> t the two points meet, and with one mask so do the two outputs."""
    net = networks.build(Mlp(width=32, depth=2), (1,), 0.5, 0, "student")
    nn.init.normal_(net.out.weight)
    b = batch(GAUSS, 256, u=0.7)
    b = Batch(b.x.float(), b.z.float(), b.u, b.mask, b.draw)
    problem = Problem(factors(weighting=Uniform(), dropout=0.5), SIGMA, net)
    r, t = schedules.pair(Fixed(N=20), problem.factors.law, b.u, 100_000, SIGMA)
    x_t = b.x + t[:, None] * b.z
    kept, other = (consistency.consistency(net, x_t, t, SIGMA, torch.tensor(k)) for k in (77, 78))
    apart = (kept - other).square().sum(1).mean()
    assert problem.losses(b, 100_000).mean() < 1e-5 * apart


def test_inverse_step_divides_each_row_by_its_step() -> None:
    b = batch(GAUSS, 50)
    plain, weighted = (
        Problem(factors(weighting=w), SIGMA, constant(0.3)).losses(b, 12)
        for w in (Uniform(), InverseStep())
    )
    net = constant(0.3)
    Problem(factors(), SIGMA, net).losses(b, 12)
    (_, r), (_, t) = points(net)
    torch.testing.assert_close(plain / weighted, (t - r).to(plain), rtol=1e-3, atol=0)


class Slope(nn.Module):
    """F = a function of x scaled by a, one equal parameter for each row: gradients row by row."""

    def __init__(self, n: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.function = nn.Parameter(torch.full((n, 1), 0.6).double()), function

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        return self.function(self.a * x)


def gradients(
    mixture: GaussianMixture, function: Callable[[Tensor], Tensor], N: int, n: int
) -> tuple[Tensor, Tensor]:
    """Gradients (n,) of CT's and of CD's loss on the same rows."""
    result, b = [], batch(mixture, n, seed=5)
    for score in (SingleSample(), Analytic()):
        net = Slope(n, function)
        problem = Problem(factors(score=score), SIGMA, net, Knowledge(density=mixture))
        problem.losses(b, N).sum().backward()
        result.append(net.a.grad[:, 0])
    return result[0], result[1]


@pytest.mark.parametrize("N", [2, 5, 20])
def test_ct_and_cd_agree_in_mean_gradient_where_f_is_linear(N: int) -> None:
    """E[f^-(x_r) | x_t] = f^-(E[x_r | x_t]) for linear f^- and L2, at any N."""
    ct, cd = gradients(GAUSS, lambda x: x, N, 200_000)
    assert abs(z_score(ct - cd)) < 4
    assert abs(z_score(cd)) > 40  # the check has power: neither gradient is 0 ...
    assert (ct - cd).std() > 0.05 * cd.std()  # ... nor are the two the same row by row


def test_ct_and_cd_differ_in_mean_gradient_on_two_modes_and_less_so_on_a_finer_grid() -> None:
    relative = []
    for N in (5, 80):
        ct, cd = gradients(TWO_MODES, lambda x: torch.tanh(4 * x), N, 200_000)
        if N == 5:
            assert abs(z_score(ct - cd)) > 10
        relative.append(abs((ct - cd).mean() / cd.mean()).item())
    assert relative[1] < relative[0] / 3


# --- the frozen target and the denoising loss ---


def test_frozen_target_is_compared_at_the_same_point_with_weight_one() -> None:
    b, net, offset = batch(GAUSS, 100), constant(0.3), torch.tensor([[0.2]]).double()

    def shifted(x_t: Tensor, t: Tensor) -> Tensor:
        return consistency.consistency(constant(0.3), x_t, t, SIGMA) + offset

    problem = Problem(factors(target=Frozen(run="ct")), SIGMA, net, frozen=shifted)
    torch.testing.assert_close(
        problem.losses(b, 20), torch.full((100,), 0.04).double(), rtol=1e-4, atol=0
    )
    assert len(net.calls) == 1 and net.calls[0][2] is b.mask
    ((x_t, t),) = points(net)
    torch.testing.assert_close(x_t, b.x + t[:, None] * b.z, rtol=1e-4, atol=1e-5)
    expected = schedules.level(problem.factors.law, b.u, SIGMA)
    torch.testing.assert_close(t.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("u", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_denoising_loss_is_d_at_every_level_at_initialisation(u: float) -> None:
    """F = 0 on N(0, sigma_data^2 I): D is then exact and the weighted loss is 1 a dimension."""
    mixture = GaussianMixture.from_lists([[0.0] * 3], [0.5], [1.0])
    net = networks.build(Mlp(width=8, depth=1), (3,), 0.0, 0, "teacher")
    b = batch(mixture, 40_000, u=u)
    rows = Problem(factors(objective=Denoising()), SIGMA, net).losses(b, 2)
    assert abs(z_score(rows.detach() - 3)) < 4


def test_denoising_sees_the_level_itself_and_the_mask() -> None:
    b, net = batch(GAUSS, 100), constant(0)
    Problem(factors(objective=Denoising(), discretization=Fixed(N=2)), SIGMA, net).losses(b, 2)
    ((x_t, t),) = points(net)
    expected = schedules.level(factors().law, b.u, SIGMA)
    torch.testing.assert_close(t.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x_t, b.x + t[:, None] * b.z, rtol=1e-4, atol=1e-5)
    assert net.calls[0][2] is b.mask


def test_the_last_gradient_is_gone_before_the_next_passes() -> None:
    net = networks.build(Mlp(width=16, depth=1), (1,), 0.0, 0, "")
    nn.init.normal_(net.out.weight)
    problem, b = Problem(factors(), SIGMA, net), batch(GAUSS, 9)
    b, held = replace(b, x=b.x.float(), z=b.z.float()), []
    net.register_forward_pre_hook(lambda *_: held.append(net.out.weight.grad is not None))
    for _ in range(2):
        problem.backward(b, *problem.levels(b, 8))
    assert len(held) == 4 and not any(held)


def test_loss_is_the_mean_over_rows_and_its_gradient_alone_stays() -> None:
    net = networks.build(Mlp(width=16, depth=1), (1,), 0.0, 0, "")
    nn.init.normal_(net.out.weight)
    problem, b = Problem(factors(), SIGMA, net), batch(GAUSS, 9)
    b = replace(b, x=b.x.float(), z=b.z.float())
    rows = problem.losses(b, 8)
    gradients = torch.autograd.grad(rows.sum() / 9, list(net.parameters()))
    for _ in range(2):
        loss = problem.backward(b, *problem.levels(b, 8))
        assert not loss.requires_grad
        torch.testing.assert_close(loss, rows.detach().mean())
        for w, g in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(w.grad, g)
