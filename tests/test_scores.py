"""Score estimates against posteriors known in closed form."""

import numpy as np
import pytest
import torch
from torch import Tensor

from study import factors
from study.mixtures import GaussianMixture
from study.posterior import Posterior
from study.scores import Knowledge, Point, estimate

KEY = torch.tensor(5)


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

    D = estimate(factors.Teacher(run="edm"), Knowledge(teachers={"edm": teacher}), Point(x, x_t, t, KEY))
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
    error, expected = D_hat - mixture.denoiser(x_t, t), mixture.posterior_covariance(x_t, t)
    products = torch.einsum("bi,bj->bij", error, error) - expected
    for h in (torch.ones(n), x_t[:, 0], x_t[:, 1].square(), (x_t[:, 0] > 0.5).double()):
        for rows in (error * h[:, None], products.flatten(1) * h[:, None]):
            z = rows.mean(0) / (rows.std(0) / np.sqrt(n))
            assert z.abs().max() < 4
