"""The empirical posterior against float64 sums over every image, closed forms, and Monte Carlo
with standard errors."""

import math

import pytest
import torch
from torch import Tensor

from study import data, factors, networks, posterior, subjects
from study.data import Batch
from study.errors import StudyError
from study.losses import Problem
from study.posterior import NEAR, Posterior
from study.scores import Knowledge

LEVELS = [0.002, 0.05, 0.4, 1.0, 5.0, 80.0]
SHAPE = (3, 8, 8)
DRAWS = 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def key(number: int = 1) -> Tensor:
    return torch.tensor(number)


def images(n: int = 600) -> Tensor:
    """Images (n, 3, 8, 8) on a 12-dimensional sheet; the last 16 repeat the 16 before them but for
    one number each, by 0.008, and one repeats altogether."""
    x = torch.randn(n, 12, generator=seeded()) @ torch.randn(12, 192, generator=seeded(1)) / 7
    x[-16:] = x[-32:-16]
    x[-15:, 5] += 0.008
    return x.view(n, *SHAPE)


def points(n: int = 5, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=seeded(3), dtype=torch.float64)


def noisy(x: Tensor, t: float | Tensor, seed: int = 7) -> Tensor:
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return x + t * torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype)


def brute(x: Tensor, x_t: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, n), mean (B, d) and trace of the covariance (B,), all in float64."""
    x, x_t = x.double().flatten(1), x_t.double().flatten(1)
    apart = (x_t[:, None] - x).square().sum(2)
    w = (-apart / (2 * t**2)).softmax(1)
    mean = w @ x
    return w, mean, torch.einsum("bn,bnd->b", w, (x - mean[:, None]).square())


def covariance(x: Tensor, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of x given one x_t (1, d)."""
    w, mean, _ = brute(x, x_t, t)
    return mean[0], torch.einsum("n,ni,nj->ij", w[0], x - mean, x - mean)


def errors(values: Tensor, expected: Tensor) -> float:
    """The largest distance of the mean over rows from what is expected, in standard errors; those
    are at least what one row counts, for what is too rare to be met."""
    values = values.double()
    spread = values.std(0) / math.sqrt(len(values))
    return ((values.mean(0) - expected).abs() / spread.clamp(min=1 / len(values))).max().item()


@pytest.mark.parametrize("t", LEVELS)
def test_weights_mean_and_variance_are_those_of_float64(t: float) -> None:
    x = images()
    law, rows = Posterior(x), torch.cat([torch.arange(12), torch.arange(560, 600)])
    x_t = noisy(x[rows], t)
    w, mean, variance = brute(x, x_t, t)
    found = law.weights(x_t, t)
    torch.testing.assert_close(found.double().sum(1), torch.ones(52).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.double(), w, rtol=1e-4, atol=2e-6)
    D = law.denoiser(x_t, t)
    assert D.shape == x_t.shape and D.dtype == torch.float32
    error = (D.flatten(1) - mean).norm(dim=1) / mean.norm(dim=1)
    assert error.max() < 5e-5
    torch.testing.assert_close(
        law.posterior_variance(x_t, t).double(), variance, rtol=1e-4, atol=1e-6 * t * mean.norm()
    )
    torch.testing.assert_close(
        law.effective_samples(x_t, t).double(), 1 / w.square().sum(1), rtol=1e-4, atol=0
    )


def test_the_mean_is_exact_at_the_size_of_colour_images() -> None:
    """Relative error below 1e-3, here 1e-4, at every level from 0.002 to 80; the image itself
    where it is a point."""
    x = torch.randn(4000, 24, generator=seeded()) @ torch.randn(24, 3072, generator=seeded(1))
    x = (x / 10).view(-1, 3, 32, 32)
    t = 0.002 * 40_000 ** torch.linspace(0, 1, 24)
    x_t = noisy(x[:24], t)
    D = Posterior(x).denoiser(x_t, t)
    assert torch.equal(D[:12], x[:12])
    for row, level, found in zip(x_t, t.tolist(), D, strict=True):
        apart = (row - x).flatten(1).double().square().sum(1)
        mean = (-apart / (2 * level**2)).softmax(0).float() @ x.flatten(1)
        assert (found.flatten() - mean).norm() < 1e-4 * mean.norm()


def test_near_duplicates_are_told_apart_where_float32_products_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """15 pairs 2.4 t apart, in one number of 192, on images of norm 100 and more: the product
    alone is off by tenths of a logit."""
    x, t = 12 * images(), 0.04
    law, x_t = Posterior(x), noisy(12 * images()[-16:], t)
    w = brute(x, x_t, t)[0]
    torch.testing.assert_close(law.weights(x_t, t).double(), w, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(posterior, "NEAR", 1)
    assert (law.weights(x_t, t) - w).abs().max() > 0.01


@pytest.mark.parametrize("t", [0.002, 0.05])
def test_where_the_posterior_is_a_point_it_is_the_very_image(t: float) -> None:
    x = images()[:-32]
    law, x_t = Posterior(x), noisy(x, t)
    assert torch.equal(law.denoiser(x_t, t), x)
    assert torch.equal(law.posterior_draws(x_t, t, key(), 2), torch.stack([x, x]))
    assert law.posterior_variance(x_t, t).abs().max() == 0
    assert law.posterior_noise(x_t, t, key()).abs().max() == 0
    assert (law.effective_samples(x_t, t) == 1).all()


@pytest.mark.parametrize("d", [3, 40])
def test_equal_weights_count_every_image(d: int) -> None:
    """The corners of a simplex, seen from its centre; and duplicates, each half of a point."""
    law, centre = Posterior(torch.eye(d)), torch.full((1, d), 1 / d)
    for t in LEVELS:
        assert law.effective_samples(centre, t).item() == pytest.approx(d, rel=1e-4)
        torch.testing.assert_close(law.denoiser(centre, t), centre, rtol=0, atol=5e-4)
        assert law.posterior_variance(centre, t).item() == pytest.approx(1 - 1 / d, rel=1e-4)
    twice = Posterior(torch.eye(d).repeat(2, 1))
    assert twice.effective_samples(torch.eye(d), 0.002).tolist() == [2.0] * d


@pytest.mark.parametrize("n", [1, 2, 5, 9, NEAR + 2])
@pytest.mark.parametrize("t", [0.3, 1.0, 20.0])
def test_draws_have_the_posteriors_law(t: float, n: int) -> None:
    """How often each point is drawn, mean and covariance, to 4.5 standard errors; with as many
    groups as a group has members (n = 9) or fewer."""
    x = points(n)
    x_t = noisy(x[:1], t)
    draws = Posterior(x).posterior_draws(x_t, t, key(), DRAWS)
    assert draws.shape == (DRAWS, 1, 3)
    draws = draws[:, 0]
    w, _, variance = brute(x, x_t, t)
    assert errors((draws[:, None] == x).all(2), w[0]) < 4.5
    mean, spread = covariance(x, x_t, t)
    assert errors(draws, mean) < 4.5
    assert errors(torch.einsum("bi,bj->bij", draws - mean, draws - mean), spread) < 4.5
    assert errors((draws - mean).square().sum(1), variance[0]) < 4.5


def test_draws_of_one_point_and_of_different_points_are_independent() -> None:
    """Covariances of draws 1 and 2, and of neighbouring rows, are 0, to 4.5 standard errors."""
    x = points()
    x_t = noisy(x[:1], 1.0)
    mean, _ = covariance(x, x_t, 1.0)
    law = Posterior(x)
    offsets = law.posterior_draws(x_t.expand(DRAWS, 3), 1.0, key(), 2) - mean  # (2, DRAWS, 3)
    for one, other in (
        (offsets[0], offsets[1]),
        (offsets[0, 1:], offsets[0, :-1]),
        (offsets[0], law.posterior_draws(x_t.expand(DRAWS, 3), 1.0, key(2), 1)[0] - mean),
    ):
        products = torch.einsum("bi,bj->bij", one, other)
        assert errors(products, torch.zeros(3, 3)) < 4.5


@pytest.mark.parametrize("t", [0.3, 1.0, 20.0])
def test_noise_has_the_posteriors_covariance(t: float) -> None:
    """Mean 0, covariance Cov[x | x_t], a normal's fourth moment: within 4.5 standard errors; rows
    independent of each other."""
    x = points()
    x_t = noisy(x[:1], t)
    field = Posterior(x).posterior_noise(x_t.expand(DRAWS, 3), t, key())
    _, spread = covariance(x, x_t, t)
    assert errors(field, torch.zeros(3)) < 4.5
    assert errors(torch.einsum("bi,bj->bij", field, field), spread) < 4.5
    assert errors(field**4, 3 * spread.diagonal() ** 2) < 4.5
    assert errors(torch.einsum("bi,bj->bij", field[1:], field[:-1]), torch.zeros(3, 3)) < 4.5


def test_blocks_change_nothing_and_levels_may_differ_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, t = images(), torch.tensor([0.05, 0.8, 1.0, 1.2, 1.5, 3.0, 80.0])
    law, x_t = Posterior(x), noisy(x[:7], t)
    names = ("denoiser", "posterior_variance", "weights", "effective_samples")

    def answers() -> list[Tensor]:
        return [getattr(law, name)(x_t, t) for name in names] + [
            law.posterior_noise(x_t, t, key()),
            law.posterior_draws(x_t, t, key(), 3),
        ]

    whole = answers()
    monkeypatch.setattr(posterior, "CHUNK", 2 * len(x))
    for a, b in zip(whole, answers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole[-1], answers()[-1])
    for i, level in enumerate(t.tolist()):
        alone = law.denoiser(x_t[i : i + 1], level)[0]
        torch.testing.assert_close(alone, whole[0][i], rtol=1e-4, atol=1e-4)


def test_random_numbers_depend_on_the_key_alone() -> None:
    x = images()
    law, x_t, state = Posterior(x), noisy(x[:50], 2.0), torch.get_rng_state()
    for draw in (
        lambda k: law.posterior_draws(x_t, 2.0, k, 2),
        lambda k: law.posterior_noise(x_t, 2.0, k),
    ):
        first, same, other = (draw(key(number)) for number in (3, 3, 4))
        assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    few, many = (law.posterior_draws(x_t, 2.0, key(), k) for k in (1, 4))
    assert torch.equal(few[0], many[0])
    assert law.posterior_draws(x_t, 2.0, key(), 0).shape == (0, 50, *SHAPE)


def test_a_posterior_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data.load(subjects.Digits())
    monkeypatch.setattr(posterior, "memory_left", lambda _: Posterior.bytes(997, 64))
    posterior.law_of.__wrapped__(dataset)
    monkeypatch.setattr(posterior, "memory_left", lambda _: Posterior.bytes(997, 64) - 1)
    with pytest.raises(StudyError, match="exact posterior over 997 images of 64 numbers needs"):
        posterior.law_of.__wrapped__(dataset)


def test_where_it_is_a_point_a_step_along_the_exact_score_is_cts() -> None:
    """In the training path, on colour images: x_r and with it the target, bit for bit."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(300, 3, 32, 32, generator=generator) * 2 - 1
    z, u = torch.randn(x[:16].shape, generator=generator), torch.rand(16, dtype=torch.float64)
    batch = Batch(x[:16], z, u, torch.tensor(1), torch.tensor(2))
    t = torch.rand(16, generator=generator) + 0.01  # up to 1
    r, x_t, targets = 0.8 * t, x[:16] + t.view(-1, 1, 1, 1) * z, []
    for score in (factors.SingleSample(), factors.Empirical()):
        point = factors.Factors(
            data=subjects.Digits(), network=subjects.Unet(), budget=factors.Budget(), score=score
        )
        net = networks.build(subjects.Unet(width=4), (3, 32, 32), 0.0, 0, "")
        torch.nn.init.normal_(net.out.weight, std=0.1, generator=generator.manual_seed(3))
        problem = Problem(point, factors.Sigma(data=0.5), net, Knowledge(law=Posterior(x)))
        targets += problem.targets(batch, x_t, r, t)
    assert torch.equal(*targets)
    far = torch.full((16,), 40.0)  # and where it is not, they differ
    problem = Problem(point, factors.Sigma(data=0.5), net, Knowledge(law=Posterior(x)))
    (exact,) = problem.targets(batch, x[:16] + 40 * z, 0.8 * far, far)
    assert not torch.equal(exact, targets[0])
