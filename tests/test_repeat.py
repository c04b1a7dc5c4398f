"""`repeat: K`, the mean of K losses at the same x_t: what it changes and what it doesn't, against
averaging inside the score, on laws where everything is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from studies import read, replaced
from torch import Tensor, nn

from study import factors
from study.data import Batch
from study.factors import (
    L1,
    L2,
    Blend,
    Budget,
    Distance,
    Factors,
    KSample,
    L2Norm,
    Own,
    PosteriorK,
    PseudoHuber,
    Score,
    Sigma,
    SingleSample,
    Teacher,
    Uniform,
    Windowed,
)
from study.losses import Problem
from study.meaning import simplest
from study.mixtures import GaussianMixture
from study.posterior import Posterior
from study.scores import Knowledge
from study.subjects import Mixture, Mlp

SIGMA = Sigma(data=0.5)
GAUSS = GaussianMixture.from_lists([[0.0]], [0.5], [1.0], torch.float64)
TWO_MODES = GaussianMixture.from_lists([[-1.0], [1.0]], [0.05, 0.05], [1, 1], torch.float64)
TWO_POINTS = Posterior(torch.tensor([[-1.0], [1.0]]).double())
T, R, POINT = 1.0, 0.7, 0.3  # a step at x_t = POINT, from T to R
ONES = (1 + math.tanh(POINT / T**2)) / 2  # on TWO_POINTS, P(x = 1 | x_t)
N = 40_000


class Net(nn.Module):
    """F = tanh(4 a x), or a x, with one equal parameter a for each row; it counts its calls."""

    def __init__(self, rows: int, linear: bool = False, a: float = 0.6) -> None:
        super().__init__()
        self.a, self.linear = nn.Parameter(torch.full((rows, 1), a).double()), linear
        self.calls: list[tuple[Tensor | None, bool]] = []

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        self.calls.append((key, torch.is_grad_enabled()))
        return self.a * x if self.linear else torch.tanh(4 * self.a * x)


def point(**changes: object) -> Factors:
    plain = {"data": Mixture(means=((0.0,),), std=0.5), "network": Mlp(), "distance": L2()}
    plain |= {"budget": Budget(images=1), "weighting": Uniform()}
    return Factors(**plain | changes)


def levels(n: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), R).double(), torch.full((n,), T).double()


def standing(law: Posterior | GaussianMixture, n: int = N, seed: int = 0) -> Batch:
    """n rows of x_t = POINT, their x drawn from the posterior."""
    x_t = torch.full((n, 1), POINT).double()
    x = law.posterior_draws(x_t, T, torch.tensor(4321 + seed), 1)[0]
    return Batch(x, (x_t - x) / T, torch.zeros(n), torch.tensor(7), torch.tensor(8 + seed))


def natural(law: GaussianMixture, n: int, seed: int = 0) -> Batch:
    """x ~ data and z ~ N(0, I), as training draws them."""
    generator = torch.Generator().manual_seed(seed)
    x = law.sample(n, generator)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return Batch(x, z, torch.zeros(n), torch.tensor(7), torch.tensor(8 + seed))


def losses(
    batch: Batch, law: Posterior | GaussianMixture, linear: bool = False, **changes: object
) -> tuple[Tensor, Tensor]:
    """Each row's loss and its gradient (n,)."""
    net = Net(len(batch.x), linear)
    known = Knowledge(law=law, teachers={"edm": lambda x_t, t: 0.4 * x_t})
    rows = Problem(point(**changes), SIGMA, net, known).at_levels(batch, *levels(len(batch.x)))[0]
    rows.sum().backward()
    return rows.detach(), net.a.grad[:, 0]


def near(rows: Tensor, expected: float, errors: float = 4.5) -> None:
    """The mean over rows agrees with what is expected, in standard errors."""
    error = rows.std() / math.sqrt(len(rows))
    assert (rows.mean() - expected).abs() <= errors * error + 1e-9, (rows.mean(), error, expected)


def z_score(rows: Tensor) -> float:
    return (rows.mean() / (rows.std() / math.sqrt(len(rows)))).item()


# --- the targets ---


def clean(targets: list[Tensor]) -> Tensor:
    """The D^ (K, n) behind the targets of a network whose output is 0: f^- = c_skip x_r, and x_r
    is on the line from x_t to D^."""
    skip = 1 / (1 + ((R - SIGMA.min) / SIGMA.data) ** 2)
    x_r = torch.stack(targets)[..., 0] / skip
    return (x_r - R / T * POINT) / (1 - R / T)


def drawn(
    law: Posterior | GaussianMixture, repeat: int, score: Score, n: int = N, seed: int = 0
) -> Tensor:
    """D^ (K, n) of every repeat on rows of the same x_t, the batch's x appended in the last."""
    batch, net = standing(law, n, seed), Net(n, linear=True, a=0.0)
    problem = Problem(point(score=score, repeat=repeat), SIGMA, net, Knowledge(law=law))
    targets = problem.targets(batch, torch.full((n, 1), POINT).double(), *levels(n))
    assert len(targets) == repeat
    return torch.cat([clean(targets), batch.x.T])


@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_first_target_is_from_x_itself_and_the_others_from_fresh_draws(repeat: int) -> None:
    """On two points: the same frequencies in every repeat, and no two of them related."""
    *found, x = drawn(TWO_POINTS, repeat, SingleSample())
    torch.testing.assert_close(found[0], x, rtol=0, atol=1e-5)
    values = torch.stack(found)
    torch.testing.assert_close(values.abs(), torch.ones_like(values), rtol=0, atol=1e-5)
    for i, rows in enumerate(values):
        near(rows, 2 * ONES - 1)
        for other in values[:i]:
            near((rows - 2 * ONES + 1) * (other - 2 * ONES + 1), 0)


@pytest.mark.parametrize(
    ("score", "share"),
    [
        (SingleSample(), 1.0),
        (PosteriorK(k=3), 1 / 3),
        (Blend(alpha=1, beta=1, residual="gaussian"), 1.0),
        (Blend(alpha=1, beta=0.5), 0.25),
    ],
    ids=str,
)
def test_estimates_of_the_repeats_are_independent_given_x_t(score: Score, share: float) -> None:
    """N(0, s^2): D = s^2 / (s^2 + t^2) x_t and Cov = s^2 t^2 / (s^2 + t^2); every repeat has that
    mean and its score's share of that variance, and their covariances are 0."""
    values = drawn(GAUSS, 3, score)[:-1] - 0.2 * POINT
    for i, rows in enumerate(values):
        near(rows, 0)
        near(rows.square(), share * 0.2)
        for other in values[:i]:
            near(rows * other, 0)


def test_shared_references_are_drawn_anew_for_every_repeat() -> None:
    """n = 2 on two points: D^ is x where x is the reference, else tanh(x_t / t^2), so each repeat
    of each batch shows its one reference."""
    found, score = [], KSample(n=2, shared=True)
    for seed in range(300):
        D_hat = drawn(TWO_POINTS, 3, score, n=60, seed=seed)[:-1]
        apart = (D_hat.abs() - 1).abs() < 1e-4
        torch.testing.assert_close(
            D_hat[~apart], torch.full_like(D_hat[~apart], 2 * ONES - 1), rtol=0, atol=1e-5
        )
        shown = [set(D_hat[i][apart[i]].sign().tolist()) for i in range(3)]
        assert all(len(references) == 1 for references in shown)
        found.append([references.pop() for references in shown])
    found = torch.tensor(found)
    for i in range(3):
        near(found[:, i], 0)
        near(found[:, i] * found[:, i - 1], 0)


def test_k_target_passes_and_one_of_the_student_all_with_one_mask() -> None:
    batch, net = standing(TWO_POINTS, 8), Net(8)
    problem = Problem(point(repeat=5), SIGMA, net, Knowledge(law=TWO_POINTS))
    problem.at_levels(batch, *levels(8))
    assert [gradient for _, gradient in net.calls] == [False] * 5 + [True]
    assert all(key is batch.mask for key, _ in net.calls)


def test_averaged_weights_give_every_target() -> None:
    batch, net, average = standing(TWO_POINTS, 8), Net(8), Net(8, a=0.2)
    drawn = point(repeat=3, target=factors.Ema(mu=0.9))
    Problem(drawn, SIGMA, net, Knowledge(law=TWO_POINTS), average=average).at_levels(
        batch, *levels(8)
    )
    assert (len(net.calls), len(average.calls)) == (1, 3)


def test_one_repeat_is_no_repeat_bit_for_bit() -> None:
    """And needs no law: CT on data whose posterior nobody knows."""
    batch = standing(TWO_POINTS, 50)
    rows = Problem(point(repeat=1), SIGMA, Net(50)).at_levels(batch, *levels(50))[0]
    assert torch.equal(rows.detach(), losses(batch, TWO_POINTS, repeat=1)[0])


# --- the estimator ---


def values(kind: Distance, linear: bool) -> tuple[Tensor, Tensor]:
    """By hand, at x_t = POINT on two points: the loss and its gradient (2,) for x = -1 and x = 1.
    f = c_skip x_t + c_out F(c_in x_t), x_r = x + (R / T) (x_t - x)."""
    s, e = 0.5, 0.002

    def f(x: Tensor, level: float, a: Tensor) -> Tensor:
        c_in = 1 / math.sqrt(level**2 + s**2)
        F = a * c_in * x if linear else torch.tanh(4 * a * c_in * x)
        return s**2 / ((level - e) ** 2 + s**2) * x + s * (level - e) * c_in * F

    a = torch.full((2,), 0.6, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-1.0, 1.0]).double()
    target = f(x + R / T * (POINT - x), R, a).detach()
    apart = f(torch.full((2,), POINT).double(), T, a) - target
    c = 0.00054
    loss = {
        L2: apart.square(),
        L1: apart.abs(),
        L2Norm: apart.abs(),
        PseudoHuber: (apart.square() + c * c).sqrt() - c,
    }[type(kind)]
    loss.sum().backward()
    return loss.detach(), a.grad


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "tanh"])
@pytest.mark.parametrize(
    "kind", [L2(), PseudoHuber(), L2Norm(), L1()], ids=lambda k: type(k).__name__
)
@pytest.mark.parametrize("repeat", [1, 2, 8])
def test_expectation_stays_and_variance_is_one_kth(
    repeat: int, kind: Distance, linear: bool
) -> None:
    """Given (t, x_t), of loss and gradient, whatever the distance: p l(1) + (1 - p) l(-1) and
    p (1 - p) (l(1) - l(-1))^2 / K."""
    found = losses(standing(TWO_POINTS), TWO_POINTS, linear, distance=kind, repeat=repeat)
    for rows, (low, high) in zip(found, values(kind, linear), strict=True):
        mean = ONES * high + (1 - ONES) * low
        near(rows, mean)
        near((rows - mean).square(), ONES * (1 - ONES) * (high - low) ** 2 / repeat)


@pytest.mark.parametrize("law", [TWO_MODES, GAUSS], ids=["two modes", "gauss"])
@pytest.mark.parametrize("kind", [L2(), PseudoHuber(c0=0.03)], ids=lambda k: type(k).__name__)
def test_mean_gradient_over_many_batches_is_that_of_one_loss(
    law: GaussianMixture, kind: Distance
) -> None:
    """x_t and x as training draws them; the same rows with K = 1 and K = 4."""
    once, more = [], []
    for seed in range(10):
        batch = natural(law, 5000, seed)
        once.append(losses(batch, law, distance=kind)[1])
        more.append(losses(batch, law, distance=kind, repeat=4)[1])
    once, more = torch.cat(once), torch.cat(more)
    assert abs(z_score(more - once)) < 4
    error = (more - once).std() / math.sqrt(len(once))
    assert 0 < error < 0.01 * once.abs().mean()  # the check has power
    assert more.var() < once.var()


def test_averaging_inside_changes_the_mean_gradient_on_two_modes_and_repeats_do_not() -> None:
    batch = natural(TWO_MODES, 50_000)
    once, inside, outside = (
        losses(batch, TWO_MODES, **changes)[1]
        for changes in ({}, {"score": PosteriorK(k=4)}, {"repeat": 4})
    )
    assert abs(z_score(inside - once)) > 10
    assert abs(z_score(outside - once)) < 4


@pytest.mark.parametrize("k", [2, 4, 16])
def test_averaging_inside_lowers_a_linear_models_loss_by_a_known_amount(k: int) -> None:
    """N(0, s^2), f^- = c x at R and D^ of variance V / k with V = s^2 t^2 / (s^2 + t^2): the
    target has the variance c^2 (1 - r / t)^2 V / k, and only that changes E|f - f^-|^2. Repeats
    keep all of it."""
    s, a, e = 0.5, 0.6, 0.002
    c = s**2 / ((R - e) ** 2 + s**2) + s * (R - e) / (R**2 + s**2) * a
    variance = (c * (1 - R / T)) ** 2 * (s**2 * T**2 / (s**2 + T**2))
    batch = natural(GAUSS, 100_000)
    once, inside, outside = (
        losses(batch, GAUSS, linear=True, **changes)
        for changes in ({}, {"score": PosteriorK(k=k)}, {"repeat": k})
    )
    near(inside[0] - once[0], -variance * (1 - 1 / k))
    near(outside[0] - once[0], 0)
    # linear f and L2: the gradient's expectation is that of the exact score either way
    near(inside[1] - once[1], 0)
    near(outside[1] - once[1], 0)


def test_both_averages_at_once() -> None:
    """posterior_k(2) inside and 3 losses outside, at one x_t: the target's variance is halved, the
    loss's own is a third of that of one such loss."""
    batch, changes = standing(GAUSS), {"score": PosteriorK(k=2)}
    single = losses(batch, GAUSS, linear=True, **changes)[0]
    triple = losses(batch, GAUSS, linear=True, repeat=3, **changes)[0]
    near(triple - single, 0)
    near(3 * (triple - single.mean()).square() - (single - single.mean()).square(), 0)


def test_another_key_draws_other_repeats_from_the_same_x() -> None:
    batch = standing(TWO_POINTS, 200)
    other = Batch(batch.x, batch.z, batch.u, batch.mask, batch.draw + 1)
    for repeat in (1, 4):
        pair = [losses(b, TWO_POINTS, repeat=repeat)[0] for b in (batch, other, batch)]
        assert torch.equal(pair[0], pair[2])
        assert torch.equal(pair[0], pair[1]) == (repeat == 1)


# --- what needs no repeat ---

EXACT = [
    Teacher(run="edm"),
    factors.Empirical(),
    factors.Analytic(),
    Blend(alpha=0.5, beta=0, run="edm"),
    Blend(alpha=0.5, beta=0, run="edm", residual="gaussian"),
    Blend(alpha=1, beta=0),
    Windowed(inside=Teacher(run="edm"), outside=factors.Empirical(), t_low=1, t_high=2),
]
NOISY = [
    SingleSample(),
    Blend(alpha=0, beta=0.5, run="edm"),
    Blend(alpha=1, beta=1, residual="gaussian"),
    KSample(n=4),
    PosteriorK(k=4),
    Own(),
    Windowed(inside=Teacher(run="edm"), outside=SingleSample(), t_low=1, t_high=2),
    Windowed(inside=PosteriorK(k=2), outside=Teacher(run="edm"), t_low=1, t_high=2),
]


@pytest.mark.parametrize("score", EXACT, ids=lambda s: str(s)[:60])
def test_losses_of_equal_targets_are_one_loss(score: Score) -> None:
    assert simplest(point(score=score, repeat=4)).repeat == 1


@pytest.mark.parametrize("score", NOISY, ids=lambda s: str(s)[:60])
def test_noisy_scores_keep_their_repeats(score: Score) -> None:
    assert simplest(point(score=score, repeat=4)).repeat == 4


@pytest.mark.parametrize("score", EXACT, ids=lambda s: str(s)[:60])
def test_repeats_of_an_exact_score_are_indeed_one_loss(score: Score) -> None:
    """As if they were not folded: the same rows, but for what a sum of four rounds."""
    batch = standing(TWO_POINTS, 50)
    known = Knowledge(law=TWO_POINTS, density=GAUSS, teachers={"edm": lambda x_t, t: 0.4 * x_t})
    rows = [
        Problem(drawn, SIGMA, Net(50), known).at_levels(batch, *levels(50))[0]
        for drawn in (point(score=score, repeat=k) for k in (1, 4))
    ]
    torch.testing.assert_close(*rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("old", "repeat", "same"),
    [
        ("{score: {kind: teacher, run: edm}", 4, True),
        ("{score: {kind: blend, alpha: .5, beta: 0, run: edm}", 4, True),
        ("{score: empirical", 2, True),
        ("{score: single_sample", 1, True),
        ("{score: single_sample", 4, False),
        ("{score: {kind: blend, alpha: .5, beta: .5, run: edm}", 4, False),
        ("{score: {kind: posterior_k, k: 1}", 4, False),
        ("{score: single_sample, target: {kind: frozen, run: first}", 4, True),
        ("{score: single_sample, objective: continuous", 4, True),
    ],
)
def test_ids_with_and_without_repeats(old: str, repeat: int, same: bool, tmp_path: Path) -> None:
    text = replaced("{score: single_sample}", f"{old}, repeat: {repeat}}}")
    text = text.replace("{score: {kind: teacher, run: edm}}", f"{old}}}")
    text = text.replace("sources:", "sources:\n  first: {}")
    found = {r.recipe.name: r.id for r in read(tmp_path, text).runs if r.seed == 0}
    assert (found["ct"] == found["cd"]) == same
