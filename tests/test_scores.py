"""Score estimates against float64 sums, sampling frequencies and posteriors known in closed form.

The reference posterior is the textbook softmax over plain float64 distances; the module's own is
float32 and, for images, an inner product about the mean.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from study import data, factors, scores
from study.mixtures import GaussianMixture
from study.scores import Knowledge, Posterior, estimate

LEVELS = [0.002, 0.05, 0.3, 0.5, 1.0, 3.0, 10.0, 80.0]
SETS = {
    "digits": factors.Digits(),
    "wide": factors.Mixture(means=((-10.0, 0.0), (10.0, 3.0)), std=0.5, samples=1500),
    "line": factors.Mixture(means=((-1.0,), (1.0,)), std=0.05, samples=1500),
}


@pytest.fixture(scope="module", params=SETS)
def train(request: pytest.FixtureRequest) -> Tensor:
    return data.to_float(data.load(SETS[request.param]).train)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return data.to_float(data.load(factors.Digits()).train)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(x: Tensor, t: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n rows of x, each with noise: (rows, x_t, t)."""
    generator = seeded(1)
    rows = torch.randint(len(x), (n,), generator=generator)
    return rows, x[rows] + t * torch.randn(x[rows].shape, generator=generator), torch.full((n,), t)


def exact(x: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, mean and variance of the posterior in float64."""
    x, x_t = x.double().flatten(1), x_t.double().flatten(1)
    square = torch.stack([(row - x).square().sum(1) for row in x_t])  # (B, n)
    logits = -square / (2 * t.double()[:, None] ** 2)
    w = (logits - logits.logsumexp(1, keepdim=True)).exp()
    mean = w @ x
    square = torch.stack([(row - x).square().sum(1) for row in mean])
    return w, mean, (w * square).sum(1)


@pytest.mark.parametrize("t", LEVELS)
def test_posterior_is_the_exact_one(train: Tensor, t: float) -> None:
    posterior = Posterior(train)
    _, x_t, t = noisy(train, t, 48)
    weights, mean, variance = exact(train, x_t, t)
    assert (posterior.weights(x_t, t) - weights).abs().sum(1).max() < 1e-4
    found = posterior.mean(x_t, t)
    assert found.shape == x_t.shape and found.dtype == torch.float32
    error = (found.flatten(1) - mean).norm(dim=1) / mean.norm(dim=1)
    assert error.max() < 1e-3
    scale = max(variance.mean().item(), 1e-12)
    assert posterior.variance(x_t, t).numpy() == pytest.approx(
        variance.numpy(), rel=1e-3, abs=1e-3 * scale
    )


def test_at_small_t_the_posterior_is_the_own_image(digits: Tensor) -> None:
    posterior = Posterior(digits)
    rows, x_t, t = noisy(digits, 0.05, 64)
    torch.testing.assert_close(posterior.mean(x_t, t), digits[rows], rtol=0, atol=1e-6)
    assert torch.equal(posterior.sample(x_t, t, seeded()), digits[rows])
    assert posterior.weights(x_t, t).gather(1, rows[:, None]).min() > 1 - 1e-6
    assert posterior.variance(x_t, t).max() < 1e-10


def test_at_large_t_the_posterior_is_the_whole_set(digits: Tensor) -> None:
    _, x_t, t = noisy(digits, 1e5, 4)
    mean = digits.mean(0).expand_as(x_t)
    torch.testing.assert_close(Posterior(digits).mean(x_t, t), mean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("t", [0.6, 2.0])
def test_draws_come_with_the_posteriors_frequencies(digits: Tensor, t: float) -> None:
    n, (_, x_t, t) = 20_000, noisy(digits, t, 1)
    weights = exact(digits, x_t, t)[0][0]
    draws = Posterior(digits).sample(x_t.expand(n, 1, 8, 8), t.expand(n), seeded())
    own = torch.cdist(draws.flatten(1), digits.flatten(1)).argmin(1)
    assert torch.equal(draws, digits[own])  # a draw is a training image
    counts = torch.bincount(own, minlength=len(digits)).double()
    often = weights * n > 8
    assert often.sum() > 3
    counts = torch.cat([counts[often], counts[~often].sum()[None]]).numpy()
    p = torch.cat([weights[often], weights[~often].sum()[None]]).numpy()
    assert stats.chisquare(counts, p / p.sum() * n).pvalue > 1e-3


def test_work_in_chunks_changes_nothing(digits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = Posterior(digits)
    _, x_t, _ = noisy(digits, 1.0, 10)
    t = torch.linspace(0.5, 2.0, 10)  # a level for each row
    whole = [posterior.mean(x_t, t), posterior.variance(x_t, t)]
    monkeypatch.setattr(scores, "CHUNK", 3 * len(digits))
    torch.testing.assert_close([posterior.mean(x_t, t), posterior.variance(x_t, t)], whole)
    assert posterior.sample(x_t, t, seeded()).shape == x_t.shape


# --- estimates ---


def test_two_points_have_tanh_for_their_denoiser() -> None:
    """x = +-1 with equal weights: E[x | x_t] = tanh(x_t / t^2)."""
    known = Knowledge(posterior=Posterior(torch.tensor([[-1.0], [1.0]])))
    x_t = torch.linspace(-3, 3, 41)[:, None]
    for t in (0.4, 1.0, 5.0):
        level = torch.full((41,), t)
        mean = estimate(factors.Empirical(), known, x_t, x_t, level)
        torch.testing.assert_close(mean, torch.tanh(x_t / t**2), rtol=1e-5, atol=1e-6)
        variance = known.posterior.variance(x_t, level)
        expected = 1 / torch.cosh(x_t[:, 0] / t**2) ** 2
        torch.testing.assert_close(variance, expected, rtol=1e-4, atol=1e-6)


def test_analytic_is_the_gaussians_posterior_mean() -> None:
    """N(m, s^2 I): D = m + s^2 / (s^2 + t^2) (x_t - m), here with s = 0.5, t = 1.5: one tenth."""
    mixture = GaussianMixture.from_lists([[2.0, -1.0]], [0.5], [1.0])
    x_t = torch.tensor([[4.0, 9.0], [2.0, -1.0]])
    D = estimate(
        factors.Analytic(), Knowledge(density=mixture), x_t + 7, x_t, torch.full((2,), 1.5)
    )
    torch.testing.assert_close(D, torch.tensor([[2.2, 0.0], [2.0, -1.0]]))


def test_teacher_and_single_sample_pass_through() -> None:
    x, x_t, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.rand(3)
    asked = []

    def teacher(*arguments: Tensor) -> Tensor:
        asked.extend(arguments)
        return arguments[0] * 2

    D = estimate(factors.Teacher(run="edm"), Knowledge(teacher=teacher), x, x_t, t)
    assert torch.equal(D, 2 * x_t)
    assert asked[0] is x_t and asked[1] is t
    assert estimate(factors.SingleSample(), Knowledge(), x, x_t, t) is x


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
    D_hat = estimate(factors.SingleSample(), Knowledge(), x, x_t, torch.full((n,), t))
    error, expected = D_hat - mixture.denoiser(x_t, t), mixture.posterior_covariance(x_t, t)
    products = torch.einsum("bi,bj->bij", error, error) - expected
    for h in (torch.ones(n), x_t[:, 0], x_t[:, 1].square(), (x_t[:, 0] > 0.5).double()):
        for rows in (error * h[:, None], products.flatten(1) * h[:, None]):
            z = rows.mean(0) / (rows.std(0) / np.sqrt(n))
            assert z.abs().max() < 4
