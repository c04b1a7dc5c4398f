"""Score estimates against posteriors known in closed form: the mean and covariance that each
states, given x_t, by Monte Carlo at fixed keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from scipy import stats
from studies import read, replaced
from torch import Tensor, nn
from tweedie import covariance

from study import factors, meaning, networks, scores, subjects, values
from study.data import Batch
from study.losses import Problem
from study.mixtures import GaussianMixture
from study.posterior import Posterior
from study.scores import Knowledge, Point, estimate

KEY = torch.tensor(5)
ROWS = 30_000
PLANE = GaussianMixture.from_lists(
    [[-1.0, 0.2], [0.7, 0.9], [0.3, -1.1]], [0.2, 0.1, 0.35], [1, 2, 3], torch.float64
)
PLACES = [((-0.1, 0.4), 0.6), ((0.5, -0.4), 0.3), ((2.0, 1.0), 2.0)]  # x_t between modes, and t


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_two_points_have_tanh_for_their_denoiser() -> None:
    """x = +-1 with equal weights: E[x | x_t] = tanh(x_t / t^2)."""
    known = Knowledge(law=Posterior(torch.tensor([[-1.0], [1.0]])))
    x_t = torch.linspace(-3, 3, 41)[:, None]
    for t in (0.4, 1.0, 5.0):
        level = torch.full((41,), t)
        mean = estimate(factors.Empirical(), known, Point(x_t, x_t, level, KEY))
        torch.testing.assert_close(mean, torch.tanh(x_t / t**2), rtol=1e-5, atol=1e-6)
        variance = known.law.posterior_variance(x_t, level)
        expected = 1 / torch.cosh(x_t[:, 0] / t**2) ** 2
        torch.testing.assert_close(variance, expected, rtol=1e-4, atol=1e-6)


def test_analytic_is_the_gaussians_posterior_mean() -> None:
    """N(m, s^2 I): D = m + s^2 / (s^2 + t^2) (x_t - m), here with s = 0.5, t = 1.5: one tenth."""
    mixture = GaussianMixture.from_lists([[2.0, -1.0]], [0.5], [1.0])
    x_t = torch.tensor([[4.0, 9.0], [2.0, -1.0]])
    at = Point(x_t + 7, x_t, torch.full((2,), 1.5), KEY)
    D = estimate(factors.Analytic(), Knowledge(density=mixture), at)
    torch.testing.assert_close(D, torch.tensor([[2.2, 0.0], [2.0, -1.0]]))


def test_teacher_and_single_sample_pass_through() -> None:
    x, x_t, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.rand(3)
    asked = []

    def teacher(*arguments: Tensor) -> Tensor:
        asked.extend(arguments)
        return arguments[0] * 2

    D = estimate(
        factors.Teacher(run="edm"), Knowledge(teachers={"edm": teacher}), Point(x, x_t, t, KEY)
    )
    assert torch.equal(D, 2 * x_t)
    assert asked[0] is x_t and asked[1] is t
    assert estimate(factors.SingleSample(), Knowledge(), Point(x, x_t, t, KEY)) is x


@pytest.mark.parametrize("t", [0.1, 0.6, 2.0])
def test_single_sample_is_unbiased_with_the_posteriors_covariance(t: float) -> None:
    """E[(D^ - D) h(x_t)] = 0 for any h, and E[(D^ - D)(D^ - D)^T h] = E[Cov[x | x_t] h]."""
    n = 100_000
    mixture = GaussianMixture.from_lists(
        [[-1.0, 0.2], [0.7, 0.9], [0.3, -1.1]], [0.2, 0.1, 0.35], [1, 2, 3], torch.float64
    )
    generator = seeded(3)
    x = mixture.sample(n, generator)
    x_t = x + t * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    at = Point(x, x_t, torch.full((n,), t), KEY)
    D_hat = estimate(factors.SingleSample(), Knowledge(), at)
    error, expected = D_hat - mixture.denoiser(x_t, t), covariance(mixture, x_t, t)
    products = torch.einsum("bi,bj->bij", error, error) - expected
    for h in (torch.ones(n), x_t[:, 0], x_t[:, 1].square(), (x_t[:, 0] > 0.5).double()):
        for rows in (error * h[:, None], products.flatten(1) * h[:, None]):
            z = rows.mean(0) / (rows.std(0) / np.sqrt(n))
            assert z.abs().max() < 4


# --- what the tests below stand on ---


def tweedie(point: Sequence[float], t: float) -> tuple[Tensor, Tensor]:
    """E[x | x_t] = x_t + t^2 grad log p_t and Cov[x | x_t] = t^2 (I + t^2 Hess log p_t), by
    automatic differentiation of PLANE's density alone."""

    def log_density(y: Tensor) -> Tensor:
        return PLANE.log_density(y[None], t)[0]

    y = torch.tensor(point, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(log_density, y)
    curvature = torch.autograd.functional.hessian(log_density, y)
    return y + t**2 * slope, t**2 * (torch.eye(2) + t**2 * curvature)


def phi(x_t: Tensor, t: Tensor) -> Tensor:
    """A teacher with an error of its own."""
    return 0.3 * x_t + torch.tensor([1.0, -0.5]).to(x_t)


def standing(
    law: GaussianMixture | Posterior, point: Sequence[float], t: float, n: int = ROWS
) -> Point:
    """n rows of one and the same x_t, their x drawn from the posterior."""
    kind = law.x if isinstance(law, Posterior) else law.means
    x_t = torch.tensor([list(point)], dtype=kind.dtype).expand(n, -1).contiguous()
    x = law.posterior_draws(x_t, t, torch.tensor(1234), 1)[0]
    return Point(x, x_t, torch.full((n,), t), torch.tensor(99))


def near(rows: Tensor, expected: Tensor | float, errors: float = 4.5) -> None:
    """The mean over rows (n, ...) agrees with what is expected, in standard errors."""
    rows = rows.double()
    apart = (rows.mean(0) - torch.as_tensor(expected, dtype=torch.float64)).abs()
    error = rows.std(0) / math.sqrt(len(rows))
    assert (apart <= errors * error + 1e-6).all(), (apart / error).tolist()


def has_moments(D_hat: Tensor, mean: Tensor | float, covariance: Tensor | float) -> None:
    """Rows (n, d) have this mean (d,) and this covariance (d, d)."""
    near(D_hat, mean)
    apart = D_hat.double() - torch.as_tensor(mean, dtype=torch.float64)
    near(torch.einsum("bi,bj->bij", apart, apart), covariance)


class Silent:
    """A law that will not tell its posterior mean."""

    def denoiser(self, x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the posterior mean was asked for")

    def posterior_noise(self, x_t: Tensor, t: Tensor, key: Tensor) -> Tensor:
        return PLANE.posterior_noise(x_t, t, key)


# --- blend: mean x noise ---

MIXES = [(0, 0), (1, 1), (1, 0), (0, 1), (0.5, 0.5), (0.25, 1.5), (1, 1.5), (1.5, -0.5)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("residual", ["posterior", "gaussian"])
@pytest.mark.parametrize(("alpha", "beta"), MIXES)
def test_blend_sets_mean_and_noise_apart(
    alpha: float, beta: float, residual: str, place: tuple
) -> None:
    """Mean (1 - alpha) D_phi + alpha E[x | x_t], covariance beta^2 Cov[x | x_t]."""
    at = standing(PLANE, *place)
    score = factors.Blend(alpha=alpha, beta=beta, run="edm", residual=residual)
    D_hat = estimate(score, Knowledge(law=PLANE, teachers={"edm": phi}), at)
    D, covariance = tweedie(*place)
    has_moments(D_hat, (1 - alpha) * phi(at.x_t[0], at.t) + alpha * D, beta**2 * covariance)


@pytest.mark.parametrize("residual", ["posterior", "gaussian"])
@pytest.mark.parametrize("t", [0.1, 0.6, 2.0])
def test_blend_of_a_noised_image_has_the_same_moments(t: float, residual: str) -> None:
    """x ~ data and x_t = x + t z, as training has it: E[(D^ - m) h(x_t)] = 0 for any h."""
    n, generator, alpha, beta = 60_000, seeded(4), 0.4, 0.8
    x = PLANE.sample(n, generator)
    x_t = x + t * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    at = Point(x, x_t, torch.full((n,), t), KEY)
    score = factors.Blend(alpha=alpha, beta=beta, run="edm", residual=residual)
    D_hat = estimate(score, Knowledge(law=PLANE, teachers={"edm": phi}), at)
    error = D_hat - (0.6 * phi(x_t, at.t) + 0.4 * PLANE.denoiser(x_t, t))
    products = torch.einsum("bi,bj->bij", error, error)
    products = products - 0.64 * covariance(PLANE, x_t, t)
    for h in (torch.ones(n), x_t[:, 0], x_t[:, 1].square(), (x_t[:, 0] > 0.5).double()):
        near(error * h[:, None], 0)
        near(products * h[:, None, None], 0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_blend_on_two_points_jumps_between_them_or_is_normal(beta: float) -> None:
    """x = +-1: D = tanh(x_t / t^2), Var = 1 - D^2. The residual has two values; its stand-in is
    normal."""
    law = Posterior(torch.tensor([[-1.0], [1.0]]))
    at, D = standing(law, [0.3], 1.1), math.tanh(0.3 / 1.1**2)
    D_hat = {
        residual: estimate(
            factors.Blend(alpha=1, beta=beta, residual=residual), Knowledge(law=law), at
        )
        for residual in ("posterior", "gaussian")
    }
    for rows in D_hat.values():
        has_moments(rows, D, beta**2 * (1 - D**2))
    values = D_hat["posterior"][:, 0].unique(sorted=True)
    expected = torch.tensor([D - beta * (1 + D), D + beta * (1 - D)])
    torch.testing.assert_close(values[[0, -1]], expected, rtol=0, atol=1e-6)
    assert ((values - expected[:1]).abs().minimum((values - expected[1:]).abs()) < 1e-6).all()
    normal = stats.norm(D, beta * math.sqrt(1 - D**2))
    assert stats.kstest(D_hat["gaussian"][:, 0].numpy(), normal.cdf).pvalue > 1e-3


def test_gaussian_residual_moves_smoothly_with_x_t() -> None:
    """With its randomness held, between two far images, where a draw of x jumps from one to the
    other."""
    law = Posterior(torch.tensor([[-1.0] * 4, [1.0] * 4]))
    line, score = torch.linspace(-2, 2, 401), factors.Blend(alpha=1, beta=1, residual="gaussian")
    found, drawn = [], []
    for c in line:
        x_t, t = c.expand(1, 4), torch.full((1,), 1.5)
        found.append(estimate(score, Knowledge(law=law), Point(x_t, x_t, t, KEY)))
        drawn.append(law.posterior_draws(x_t, t, KEY, 1)[0])
    steps, jumps = (torch.cat(rows).diff(dim=0).abs().max() for rows in (found, drawn))
    assert jumps == 2 and steps < 0.05
    assert torch.cat(found).std() > 0.3  # it does move


@pytest.mark.parametrize(("alpha", "beta"), MIXES)
def test_gaussian_residual_never_looks_at_x(alpha: float, beta: float) -> None:
    at = standing(PLANE, *PLACES[0], n=10)
    score = factors.Blend(alpha=alpha, beta=beta, run="edm", residual="gaussian")
    known = Knowledge(law=PLANE, teachers={"edm": phi})
    blind = Point(torch.full_like(at.x, torch.nan), at.x_t, at.t, at.draw)
    assert torch.equal(estimate(score, known, blind), estimate(score, known, at))
    again = Point(at.x, at.x_t, at.t, at.draw + 1)
    assert torch.equal(estimate(score, known, again), estimate(score, known, at)) == (beta == 0)


@pytest.mark.parametrize("dose", [0, 0.25, 0.5, 1, 1.5])
def test_dose_line_never_asks_for_the_posterior_mean(dose: float) -> None:
    """alpha = beta: D^ = (1 - dose) D_phi + dose x."""
    at = standing(PLANE, *PLACES[0], n=10)
    known = Knowledge(law=Silent(), teachers={"edm": phi})
    D_hat = estimate(factors.Blend(alpha=dose, beta=dose, run="edm"), known, at)
    torch.testing.assert_close(D_hat, (1 - dose) * phi(at.x_t, at.t) + dose * at.x)


def test_one_one_is_x_and_asks_nobody() -> None:
    at = standing(PLANE, *PLACES[0], n=10)
    D_hat = estimate(factors.Blend(alpha=1, beta=1), Knowledge(law=Silent()), at)
    assert torch.equal(D_hat, at.x)


def test_noisy_distillation_with_normal_noise_needs_no_posterior_mean_either() -> None:
    at = standing(PLANE, *PLACES[0])
    score = factors.Blend(alpha=0, beta=1, run="edm", residual="gaussian")
    D_hat = estimate(score, Knowledge(law=Silent(), teachers={"edm": phi}), at)
    has_moments(D_hat, phi(at.x_t[0], at.t), tweedie(*PLACES[0])[1])


# --- averages of posterior draws ---


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("k", [2, 4, 16])
def test_posterior_k_has_one_kth_of_the_covariance(k: int, place: tuple) -> None:
    """The same mean; and x is one of the k, so Cov[D^, x | x_t] is Cov / k too."""
    at, (D, covariance) = standing(PLANE, *place), tweedie(*place)
    D_hat = estimate(factors.PosteriorK(k=k), Knowledge(law=PLANE), at)
    has_moments(D_hat, D, covariance / k)
    near(torch.einsum("bi,bj->bij", D_hat - D, at.x - D), covariance / k)
    moved = Point(at.x + 10, at.x_t, at.t, at.draw)
    further = estimate(factors.PosteriorK(k=k), Knowledge(law=PLANE), moved)
    torch.testing.assert_close(further - D_hat, torch.full_like(D_hat, 10 / k))


@pytest.mark.parametrize("k", [2, 5])
def test_posterior_k_on_two_points_is_binomial(k: int) -> None:
    """k draws of +-1: (k + k D^) / 2 counts the ones, P(1) = (1 + tanh(x_t / t^2)) / 2."""
    law = Posterior(torch.tensor([[-1.0], [1.0]]))
    at, D = standing(law, [-0.2], 0.9), math.tanh(-0.2 / 0.9**2)
    D_hat = estimate(factors.PosteriorK(k=k), Knowledge(law=law), at)[:, 0]
    has_moments(D_hat[:, None], D, (1 - D**2) / k)
    counts = torch.bincount((k * (1 + D_hat) / 2).round().long(), minlength=k + 1).numpy()
    expected = stats.binom(k, (1 + D) / 2).pmf(np.arange(k + 1)) * len(D_hat)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_average_of_one_draw_is_x() -> None:
    for law in (PLANE, Posterior(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))):
        at = standing(law, (0.1, 0.2), 1.0, n=7)
        assert torch.equal(estimate(factors.PosteriorK(k=1), Knowledge(law=law), at), at.x)


# --- n references ---

POOLS = [(-1.0, 1.0), (-1.0, -1.0, 1.0), (-1.0, 0.4, 1.0)]
LINE_T, LINE_POINT = 1.2, 0.25


def with_references(x: float, references: Sequence[float], point: float) -> float:
    """The self-normalised mean over x and its references, in plain numbers."""
    among = (x, *references)
    weights = [math.exp(-((point - y) ** 2) / (2 * LINE_T**2)) for y in among]
    return sum(w * y for w, y in zip(weights, among, strict=True)) / sum(weights)


def enumerated(pool: Sequence[float], n: int, point: float = LINE_POINT) -> tuple[float, float]:
    """Mean and variance of D^ given x_t: x by its posterior, every reference alike likely."""
    likely = [math.exp(-((point - x) ** 2) / (2 * LINE_T**2)) for x in pool]
    cases = [
        (p / sum(likely) / len(pool) ** (n - 1), with_references(x, references, point))
        for p, x in zip(likely, pool, strict=True)
        for references in itertools.product(pool, repeat=n - 1)
    ]
    mean = sum(p * D for p, D in cases)
    return mean, sum(p * (D - mean) ** 2 for p, D in cases)


def line(pool: Sequence[float]) -> Posterior:
    return Posterior(torch.tensor(pool)[:, None])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_k_sample_has_the_enumerated_law(pool: tuple, n: int) -> None:
    law = line(pool)
    at = standing(law, [LINE_POINT], LINE_T)
    D_hat = estimate(factors.KSample(n=n), Knowledge(law=law), at)
    mean, variance = enumerated(pool, n)
    has_moments(D_hat, mean, variance)
    assert n > 1 or torch.equal(D_hat, at.x)


def test_two_references_on_two_points_by_hand() -> None:
    """x = +-1, m = tanh(x_t / t^2): with a second reference D^ is x or m, evenly, so the mean is m
    and the variance (1 - m^2) / 2."""
    m = math.tanh(LINE_POINT / LINE_T**2)
    assert enumerated(POOLS[0], 2) == pytest.approx((m, (1 - m**2) / 2))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_shared_references_have_the_same_law_row_by_row(pool: tuple, n: int) -> None:
    """Over keys, since a batch has one set: every row's mean and second moment."""
    law = line(pool)
    at, keys = standing(law, [LINE_POINT], LINE_T, n=400), torch.arange(1500)
    mean, variance = enumerated(pool, n)
    found = torch.stack([
        estimate(factors.KSample(n=n, shared=True), Knowledge(law=law), Point(
            at.x[key % 400 :], at.x_t[key % 400 :], at.t[key % 400 :], key))[0, 0]
        for key in keys
    ]).double()  # fmt: skip
    near(found, mean)
    near((found - mean).square(), variance)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [2, 3])
def test_shared_references_are_common_to_the_rows(n: int, shared: bool) -> None:
    """Covariance of two rows, x and x_t of both fixed: that of the enumeration, or 0."""
    pool, xs, points = POOLS[2], (-1.0, 0.4), (0.25, -0.3)
    cases = torch.tensor([
        [with_references(x, references, point) for x, point in zip(xs, points, strict=True)]
        for references in itertools.product(pool, repeat=n - 1)
    ]).double()  # fmt: skip
    mean, together = cases.mean(0), (cases - cases.mean(0)).prod(1).mean()
    assert together.abs() > 0.01  # the check has power
    x, x_t = torch.tensor(xs)[:, None], torch.tensor(points)[:, None]
    score, known = factors.KSample(n=n, shared=shared), Knowledge(law=line(pool))
    found = torch.stack([
        estimate(score, known, Point(x, x_t, torch.full((2,), LINE_T), key))[:, 0]
        for key in torch.arange(3000)
    ]).double()  # fmt: skip
    near(found, mean)
    near((found - mean).square(), cases.var(0, correction=0))
    near((found - mean).prod(1), together if shared else 0.0)


@pytest.mark.parametrize("size", [2, 4, 10])
def test_references_of_like_keys_are_unlike(size: int) -> None:
    """Far above the data all weights are equal, and D^ = (x + reference) / 2 shows the choice."""
    law, rows = line([float(i) for i in range(size)]), 4096
    x, t = torch.zeros(rows, 1), torch.full((rows,), 1e5)

    def choice(key: int) -> Tensor:
        at = Point(x, x, t, torch.tensor(key))
        return (2 * estimate(factors.KSample(n=2), Knowledge(law=law), at)[:, 0]).round().long()

    for key in (5, 123_456_789):
        own = choice(key)
        assert stats.chisquare(torch.bincount(own, minlength=size).numpy()).pvalue > 1e-3
        for bit in range(31):
            same = (own == choice(key ^ 1 << bit)).double()
            near(same, 1 / size)


@pytest.mark.parametrize("shared", [False, True])
def test_many_references_approach_the_posterior_mean_at_the_rate_1_over_n(shared: bool) -> None:
    """n E|D^ - D|^2 -> N sum_i w_i^2 (x_i - D)^2, for N points of posterior weights w."""
    pool = torch.randn(100, generator=seeded(1)).double()
    law, t, point = Posterior(pool[:, None]), 0.6, 0.3
    weights = torch.exp(-((point - pool) ** 2) / (2 * t**2))
    weights /= weights.sum()
    D = weights @ pool
    limit = 100 * (weights**2 @ (pool - D) ** 2)
    for n in (300, 3000):
        if shared:
            one = standing(law, [point], t, n=600)
            D_hat = torch.cat([
                estimate(factors.KSample(n=n, shared=True), Knowledge(law=law),
                         Point(one.x[i:i + 1], one.x_t[i:i + 1], one.t[i:i + 1], torch.tensor(i)))
                for i in range(600)
            ])  # fmt: skip
        else:
            at = standing(law, [point], t, n=2000)
            D_hat = estimate(factors.KSample(n=n), Knowledge(law=law), at)
        assert (D_hat.mean() - D).abs() < 4.5 * D_hat.std() / math.sqrt(len(D_hat)) + 3 / n
        squares = n * (D_hat - D).square()
        slack = 4.5 * squares.std() / math.sqrt(len(squares)) + 20 * limit / n
        assert (squares.mean() - limit).abs() < slack
        assert slack < limit / 3


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [1, 64, 3072])
def test_k_sample_loses_no_digits_between_close_neighbours(size: int, shared: bool) -> None:
    """x and one other image a distance t apart at t = 0.002, dimensions of the size of pixels:
    D^ = x + sigmoid(-(|o|^2 / 2 - <x_t - x, o>) / t^2) o with o = other - x, in float64."""
    t, generator = 0.002, seeded(2)
    x = 2 * torch.rand(50, size, generator=generator) - 1
    other = (x[0] + t / math.sqrt(size) * torch.randn(size, generator=generator))[None]
    x = x[:1].expand(50, -1)
    x_t = x + t * torch.randn(50, size, generator=generator)
    at = Point(x, x_t, torch.full((50,), t), KEY)
    D_hat = estimate(factors.KSample(n=2, shared=shared), Knowledge(law=Posterior(other)), at)
    o, e = (other - x).double(), (x_t - x).double()
    level = at.t.double()
    share = torch.sigmoid(-(o.square().sum(1) / 2 - (e * o).sum(1)) / level**2)
    assert 0.05 < share.mean() < 0.95
    found = ((D_hat.double() - x) * o).sum(1) / o.square().sum(1)  # the other's share
    torch.testing.assert_close(found, share, rtol=0, atol=1e-2 if shared else 2e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_far_from_all_others_k_sample_is_the_image_bit_for_bit(shared: bool) -> None:
    x, others = (torch.rand(20, 3, 4, 4, generator=seeded(k)) * 2 - 1 for k in (1, 2))
    x_t = x + 0.002 * torch.randn(x.shape, generator=seeded(3))
    at = Point(x, x_t, torch.full((20,), 0.002), KEY)
    score = factors.KSample(n=64, shared=shared)
    assert torch.equal(estimate(score, Knowledge(law=Posterior(others)), at), x)
    among = Posterior(torch.cat([others, x]))  # it may be drawn itself: thirds of it add up
    D_hat = estimate(score, Knowledge(law=among), at)
    torch.testing.assert_close(D_hat, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 50, 333, 4000])
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_change_nothing(shared: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, 5, generator=seeded(1))
    at = Point(x, x + torch.randn(40, 5, generator=seeded(2)), torch.full((40,), 1.0), KEY)
    score, endless = (
        factors.KSample(n=9, shared=shared),
        GaussianMixture.from_lists([[0.0] * 5], [1.0], [1.0]),
    )
    for law in (Posterior(torch.randn(70, 5, generator=seeded(3))), endless):
        monkeypatch.setattr(scores, "CHUNK", 1 << 26)
        whole = estimate(score, Knowledge(law=law), at)
        monkeypatch.setattr(scores, "CHUNK", chunk)
        torch.testing.assert_close(
            estimate(score, Knowledge(law=law), at), whole, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_endless_data_take_their_references_from_the_batch_but_never_x_itself(
    shared: bool, n: int
) -> None:
    """Three rows: every reference is row 0, 1 or 2 evenly, and a row's own is left out."""
    law = GaussianMixture.from_lists([[0.0]], [1.0], [1.0])
    xs, points = (-1.0, 0.4, 0.9), (0.25, -0.3, 1.0)
    cases = torch.tensor([
        [with_references(x, [xs[j] for j in chosen if j != i], point)
         for i, (x, point) in enumerate(zip(xs, points, strict=True))]
        for chosen in itertools.product(range(3), repeat=n - 1)
    ]).double()  # fmt: skip
    x, x_t = torch.tensor(xs)[:, None], torch.tensor(points)[:, None]
    score = factors.KSample(n=n, shared=shared)
    found = torch.stack([
        estimate(score, Knowledge(law=law), Point(x, x_t, torch.full((3,), LINE_T), key))[:, 0]
        for key in torch.arange(2000)
    ]).double()  # fmt: skip
    near(found, cases.mean(0))
    near((found - cases.mean(0)).square(), cases.var(0, correction=0))
    outcomes = (found[:, None] - cases).abs() < 1e-6  # (keys, outcomes, rows)
    assert outcomes.any(1).all() and outcomes.any(0).all()
    assert outcomes.all(2).any(1).all() == shared  # one set for all rows, or not


def test_a_batch_of_one_endless_image_has_no_reference_but_itself() -> None:
    at = standing(PLANE, *PLACES[0], n=1)
    for shared in (True, False):
        D_hat = estimate(factors.KSample(n=5, shared=shared), Knowledge(law=PLANE), at)
        assert torch.equal(D_hat, at.x)


# --- windows ---


def constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: torch.full_like(x_t, value)


WINDOW = factors.Windowed(
    inside=factors.Teacher(run="in"), outside=factors.Teacher(run="out"), t_low=0.5, t_high=2.0
)
SIDES = Knowledge(teachers={"in": constant(1.0), "out": constant(0.0)})


def test_window_is_open_below_and_closed_above() -> None:
    ends = torch.tensor([0.5, 2.0])
    t = torch.cat([ends, ends.nextafter(torch.zeros(2)), ends.nextafter(9 * torch.ones(2))])
    x = torch.zeros(6, 1, 2, 2)
    found = estimate(WINDOW, SIDES, Point(x, x, t, KEY))
    inside = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    assert torch.equal(found, inside.view(-1, 1, 1, 1).expand_as(x))


def test_window_asks_where_the_step_started() -> None:
    x, t = torch.zeros(4, 2), torch.tensor([0.1, 0.6, 1.9, 3.0])
    start = torch.tensor([0.6, 2.5, 2.0, 3.5])
    found = estimate(WINDOW, SIDES, Point(x, x, t, KEY, start=start))
    assert found[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_heuns_second_slope_keeps_the_window_of_its_step() -> None:
    """A constant D^ = a makes a straight path: x_r = a + (r / t) (x_t - a), on one side of the
    window for t just above 0.5 and r below it, on the other for t above 2 and r below that."""
    sigma, n = factors.Sigma(min=0.1, max=5.0, data=1e6), 8  # at so great a scale f = c_skip x_t
    net = nn.Module()
    net.forward = lambda x, *_: torch.zeros_like(x)
    point = factors.Factors(
        data=subjects.Digits(), network=subjects.Mlp(), budget=factors.Budget(images=1),
        score=WINDOW, solver=factors.Heun(),
    )  # fmt: skip
    t = torch.tensor([0.6, 2.1]).repeat(n // 2).double()
    r = torch.tensor([0.3, 1.5]).repeat(n // 2).double()
    x = torch.randn(n, 2, generator=seeded(1)).double()
    batch = Batch(x, x, t, KEY, KEY)
    (found,) = Problem(point, sigma, net, SIDES).targets(batch, x, r, t)
    a = torch.tensor([1.0, 0.0]).repeat(n // 2).double()[:, None]
    torch.testing.assert_close(found, a + (r / t)[:, None] * (x - a))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_both_sides_of_a_window_keep_their_moments(place: tuple) -> None:
    """D^ = x inside, half its noise about the exact mean outside."""
    at, (D, covariance) = standing(PLANE, *place), tweedie(*place)
    start = torch.tensor([1.0, 3.0]).repeat(ROWS // 2)
    score = factors.Windowed(
        inside=factors.SingleSample(),
        outside=factors.Blend(alpha=1, beta=0.5),
        t_low=0.5,
        t_high=2,
    )
    D_hat = estimate(score, Knowledge(law=PLANE), Point(at.x, at.x_t, at.t, at.draw, start=start))
    has_moments(D_hat[0::2], D, covariance)
    has_moments(D_hat[1::2], D, covariance / 4)


# --- the student's own denoiser ---


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("progress", "a"), [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.7, 1.0)]
)
def test_own_grows_from_x_to_the_head(progress: float, a: float, kind: Callable) -> None:
    """Mean (1 - a) E[x | x_t] + a D_own, covariance (1 - a)^2 Cov; a = progress / ramp, at most
    1."""
    at, (D, covariance) = standing(PLANE, *PLACES[0]), tweedie(*PLACES[0])
    at = Point(at.x, at.x_t, at.t, at.draw, kind(progress))
    D_hat = estimate(factors.Own(ramp=0.2), Knowledge(own=phi), at)
    has_moments(D_hat, (1 - a) * D + a * phi(at.x_t[0], at.t), (1 - a) ** 2 * covariance)
    if a in (0, 1):
        assert torch.equal(D_hat, phi(at.x_t, at.t) if a else at.x)


@pytest.mark.parametrize("objective", [factors.Consistency(), factors.Continuous()], ids=str)
def test_no_gradient_reaches_the_head_through_the_estimate(
    objective: factors.Objective,
) -> None:
    gain = torch.ones((), requires_grad=True)
    net = networks.build(subjects.Mlp(width=8, depth=1), (2,), 0.0, 0, "student")
    nn.init.normal_(net.out.weight)
    point = factors.Factors(
        data=subjects.Digits(), network=subjects.Mlp(), budget=factors.Budget(images=1),
        score=factors.Own(), objective=objective, discretization=factors.Fixed(N=8),
    )  # fmt: skip
    known = Knowledge(own=lambda x_t, t: gain * x_t)
    x, z = (torch.randn(6, 2, generator=seeded(k)) for k in (1, 2))
    batch = Batch(x, z, torch.linspace(0.3, 0.9, 6).double(), KEY, KEY)
    loss = Problem(point, factors.Sigma(data=0.5), net, known).losses(batch, 8).mean()
    loss.backward()
    assert gain.grad is None
    assert net.out.weight.grad.abs().sum() > 0


# --- shapes, and what means the same ---

ALL = [
    factors.SingleSample(), factors.Teacher(run="in"), factors.Empirical(),
    factors.Blend(alpha=0.5, beta=0.7, run="in"),
    factors.Blend(alpha=0.5, beta=0.7, run="in", residual="gaussian"),
    factors.KSample(n=3), factors.KSample(n=3, shared=True), factors.PosteriorK(k=3),
    factors.Own(), WINDOW,
]  # fmt: skip


PLAIN = factors.Factors(
    data=subjects.Digits(), network=subjects.Mlp(), budget=factors.Budget(images=1)
)


class Unheard(values.Kind, frozen=True, tag="unheard"):
    """A score that its author forgot to tell of."""


def test_a_new_score_is_asked_for_wherever_its_meaning_is_told() -> None:
    window = factors.Windowed(inside=Unheard(), outside=Unheard(), t_low=0.1, t_high=1.0)
    for score in (Unheard(), window):
        with pytest.raises(AssertionError, match="Unheard"):
            meaning.deterministic(score)
        with pytest.raises(AssertionError, match="Unheard"):
            meaning.reads_law(msgspec.structs.replace(PLAIN, score=score))


class Noticing(Knowledge):
    """Knowledge that notices whether its law is looked at."""

    looked = False

    def __getattribute__(self, name: str) -> object:
        if name == "law":
            object.__setattr__(self, "looked", True)
        return super().__getattribute__(name)


@pytest.mark.parametrize("score", [
    *ALL, factors.Analytic(), msgspec.structs.replace(WINDOW, inside=factors.Empirical()),
], ids=lambda s: str(s)[:60])  # fmt: skip
def test_the_posterior_is_loaded_for_those_that_consult_it_alone(score: factors.Score) -> None:
    images = torch.rand(30, 2, generator=seeded(1))
    x, x_t = images[:6], images[:6] + torch.randn(6, 2, generator=seeded(2))
    known = Noticing(Posterior(images), PLANE, SIDES.teachers, constant(0.5))
    estimate(score, known, Point(x, x_t, torch.full((6,), 0.5), KEY))
    asked = msgspec.structs.replace(PLAIN, score=score)
    assert meaning.reads_law(asked) == known.looked


@pytest.mark.parametrize("score", ALL, ids=lambda s: str(s)[:60])
def test_estimates_have_the_images_shape_and_repeat_themselves(score: factors.Score) -> None:
    images = torch.rand(30, 3, 4, 4, generator=seeded(1)) * 2 - 1
    known = Knowledge(law=Posterior(images), teachers=SIDES.teachers, own=constant(0.5))
    x, x_t = images[:6], images[:6] + torch.randn(6, 3, 4, 4, generator=seeded(2))
    at = Point(x, x_t, torch.linspace(0.1, 4, 6), KEY, 0.05)
    D_hat = estimate(score, known, at)
    assert D_hat.shape == x.shape and D_hat.dtype == x.dtype and D_hat.isfinite().all()
    assert torch.equal(estimate(score, known, at), D_hat)


FINITE, ENDLESS = "samples: 500", "held_out: 2048"
SAME = [
    ("{kind: blend, alpha: 0, beta: 0, run: edm}", "{kind: teacher, run: edm}"),
    ("{kind: blend, alpha: 0, beta: 0, run: edm, residual: gaussian}",
     "{kind: teacher, run: edm}"),
    ("{kind: blend, alpha: 1, beta: 1}", "single_sample"),
    ("{kind: blend, alpha: .5, beta: 0, run: edm, residual: gaussian}",
     "{kind: blend, alpha: .5, beta: 0, run: edm}"),
    ("{kind: posterior_k, k: 1}", "single_sample"),
    ("{kind: k_sample, n: 1}", "single_sample"),
    ("{kind: k_sample, n: 1, shared: true}", "single_sample"),
    ("{kind: windowed, inside: {kind: teacher, run: edm}, outside: {kind: teacher, run: edm}, "
     "t_low: 1, t_high: 2}", "{kind: teacher, run: edm}"),
    ("{kind: windowed, inside: single_sample, outside: {kind: posterior_k, k: 1}, t_low: 1, "
     "t_high: 2}", "single_sample"),
    ("{kind: windowed, inside: single_sample, outside: {kind: blend, alpha: 0, beta: 0, "
     "run: edm}, t_low: 1, t_high: 2}",
     "{kind: windowed, inside: single_sample, outside: {kind: teacher, run: edm}, t_low: 1, "
     "t_high: 2}"),
]  # fmt: skip
OTHER = [
    ("{kind: blend, alpha: 1, beta: 1, residual: gaussian}", "single_sample"),
    ("{kind: blend, alpha: .5, beta: .5, run: edm}", "single_sample"),
    ("{kind: blend, alpha: .5, beta: .5, run: edm, residual: gaussian}",
     "{kind: blend, alpha: .5, beta: .5, run: edm}"),
    ("{kind: blend, alpha: 0, beta: 1, run: edm}", "{kind: teacher, run: edm}"),
    ("{kind: posterior_k, k: 2}", "single_sample"),
    ("{kind: k_sample, n: 2}", "{kind: k_sample, n: 2, shared: true}"),
    ("{kind: windowed, inside: single_sample, outside: {kind: teacher, run: edm}, t_low: 1, "
     "t_high: 2}",
     "{kind: windowed, outside: single_sample, inside: {kind: teacher, run: edm}, t_low: 1, "
     "t_high: 2}"),
]  # fmt: skip


def ids(folder: Path, given: str, other: str, size: str) -> tuple[str, str]:
    """Run ids of two variants that differ in their scores."""
    text = replaced("score: single_sample", f"score: {given}")
    text = text.replace("{score: {kind: teacher, run: edm}}", f"{{score: {other}}}")
    study = read(folder, text.replace(FINITE, size))
    found = {r.recipe.name: r.id for r in study.runs if r.seed == 0}
    return found["ct"], found["cd"]


@pytest.mark.parametrize("size", [FINITE, ENDLESS])
@pytest.mark.parametrize(("given", "other"), SAME)
def test_what_means_the_same_is_one_run(given: str, other: str, size: str, tmp_path: Path) -> None:
    first, second = ids(tmp_path, given, other, size)
    assert first == second


@pytest.mark.parametrize(("given", "other"), OTHER)
def test_what_means_something_else_is_another_run(given: str, other: str, tmp_path: Path) -> None:
    first, second = ids(tmp_path, given, other, FINITE)
    assert first != second


@pytest.mark.parametrize(("size", "exact"), [(FINITE, "empirical"), (ENDLESS, "analytic")])
@pytest.mark.parametrize("residual", ["posterior", "gaussian"])
def test_exact_mean_without_noise_is_empirical_or_analytic(
    size: str, exact: str, residual: str, tmp_path: Path
) -> None:
    blend = f"{{kind: blend, alpha: 1, beta: 0, residual: {residual}}}"
    first, second = ids(tmp_path, blend, exact, size)
    assert first == second


@pytest.mark.parametrize(("given", "other"), SAME)
def test_what_is_folded_is_the_same_estimate(given: str, other: str) -> None:
    """D^ as written and D^ in fewest words, at the same points."""

    def read_score(text: str) -> factors.Score:
        plain = YAML(typ="safe").load(text)
        plain = {"kind": plain} if isinstance(plain, str) else plain
        for side in ("inside", "outside"):
            if isinstance(plain.get(side), str):
                plain[side] = {"kind": plain[side]}
        return msgspec.convert(plain, factors.Score)

    law = Posterior(torch.randn(30, 2, generator=seeded(1)))
    known, at = Knowledge(law=law, teachers={"edm": phi}), standing(law, (0.2, 0.1), 1.0, n=50)
    at = Point(at.x, at.x_t, torch.linspace(0.5, 2.5, 50), at.draw)
    torch.testing.assert_close(
        *(estimate(read_score(text), known, at) for text in (given, other)), rtol=1e-6, atol=1e-6
    )
