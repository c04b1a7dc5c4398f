"""Rank-sized algebra against dense matrices in float64, scipy, automatic differentiation and
Monte Carlo with standard errors."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, stats

from study import lowrank
from study.lowrank import LowRankMixture
from study.mixtures import heun

LEVELS = [0.002, 0.05, 0.4, 1.0, 5.0, 80.0]
SHAPE, K, RANK = (1, 3, 4), 3, 3
D = math.prod(SHAPE)


def made(seed: int = 0, components: int = K) -> LowRankMixture:
    """A mixture whose components overlap from t = 0.4 on; one direction has no spread."""
    generator = seeded(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bases = torch.linalg.qr(normal(components, D, RANK))[0].mT
    spreads = normal(components, RANK).square()
    spreads[0, 0] = 0.0
    stds = torch.linspace(0.05, 0.3, components, dtype=torch.float64)
    weights = torch.arange(1.0, components + 1, dtype=torch.float64)
    return LowRankMixture(
        SHAPE, 0.4 * normal(components, D), bases, spreads, stds, weights.log().log_softmax(0)
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def key(number: int = 1) -> torch.Tensor:
    return torch.tensor(number)


def noisy(mixture: LowRankMixture, t: float, n: int, seed: int = 1) -> torch.Tensor:
    x = mixture.sample(n, seeded(seed)).double()
    return x + t * torch.randn(x.shape, generator=seeded(seed + 1), dtype=x.dtype)


def covariances(mixture: LowRankMixture) -> np.ndarray:
    """S_k (K, D, D), dense."""
    parts = zip(mixture.bases.numpy(), mixture.spreads.numpy(), mixture.stds.numpy(), strict=True)
    return np.stack([U.T @ np.diag(spread) @ U + s**2 * np.eye(D) for U, spread, s in parts])


def dense(mixture: LowRankMixture, x_t: torch.Tensor, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of x given one x_t, by textbook conditioning."""
    x = x_t.flatten().numpy()
    means, S = mixture.means.numpy(), covariances(mixture)
    noise = t**2 * np.eye(D)
    logs = [
        lw + stats.multivariate_normal(m, s + noise).logpdf(x)
        for lw, m, s in zip(mixture.log_weights.numpy(), means, S, strict=True)
    ]
    g = np.exp(logs - np.logaddexp.reduce(logs))
    gains = [linalg.solve(s + noise, s, assume_a="pos").T for s in S]
    centres = np.stack([m + a @ (x - m) for m, a in zip(means, gains, strict=True)])
    mean = g @ centres
    within = sum(w * (s - a @ s) for w, s, a in zip(g, S, gains, strict=True))
    offsets = centres - mean
    return mean, within + np.einsum("k,ki,kj->ij", g, offsets, offsets)


@pytest.mark.parametrize("t", [0.0, *LEVELS])
def test_log_density_is_scipys(t: float) -> None:
    mixture = made()
    x_t = noisy(mixture, t, 20)
    logs = [
        lw + stats.multivariate_normal(m, s + t**2 * np.eye(D)).logpdf(x_t.flatten(1).numpy())
        for lw, m, s in zip(
            mixture.log_weights.numpy(), mixture.means.numpy(), covariances(mixture), strict=True
        )
    ]
    expected = np.logaddexp.reduce(logs)
    assert mixture.log_density(x_t, t).numpy() == pytest.approx(expected, rel=1e-9, abs=1e-8)
    assert mixture.component(x_t, t).tolist() == np.argmax(logs, 0).tolist()


@pytest.mark.parametrize("t", [0.0, *LEVELS])
def test_score_is_the_gradient_of_log_density(t: float) -> None:
    x_t = noisy(made(), t, 20).requires_grad_()
    (gradient,) = torch.autograd.grad(made().log_density(x_t, t).sum(), x_t)
    torch.testing.assert_close(made().score(x_t.detach(), t), gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", LEVELS)
def test_posterior_mean_and_variance_are_dense_conditioning(t: float) -> None:
    x_t = noisy(made(), t, 12)
    D_x, variance = made().denoiser(x_t, t), made().posterior_variance(x_t, t)
    assert D_x.shape == x_t.shape
    for row, mean, trace in zip(x_t, D_x, variance, strict=True):
        expected, covariance = dense(made(), row, t)
        assert mean.flatten().numpy() == pytest.approx(expected, rel=1e-8, abs=1e-9)
        assert trace.item() == pytest.approx(np.trace(covariance), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("t", LEVELS)
def test_tweedie_second_order(t: float) -> None:
    """Tr Cov[x | x_t] = t^2 Tr dD/dx."""
    x_t = noisy(made(), t, 8)
    jacobian = torch.func.jacrev(lambda x: made().denoiser(x, t).flatten(1).sum(0))(x_t)  # D x ...
    trace = torch.einsum("dbd->b", jacobian.flatten(2))
    torch.testing.assert_close(
        made().posterior_variance(x_t, t), t**2 * trace, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("t", [0.1, 0.8, 4.0])
def test_posterior_draws_have_the_posteriors_moments(t: float) -> None:
    n = 20_000
    for row in noisy(made(), t, 2, seed=4):
        draws = made().posterior_draws(row[None], t, key(), n)
        assert draws.shape == (n, 1, *SHAPE)
        mean, covariance = dense(made(), row, t)
        offsets = draws.flatten(1).numpy() - mean  # (n, D)
        error = offsets.mean(0) / (offsets.std(0) / n**0.5)
        assert np.abs(error).max() < 4.5
        products = np.einsum("bi,bj->bij", offsets, offsets)
        error = (products.mean(0) - covariance) / (products.std(0) / n**0.5)
        assert np.abs(error).max() < 4.5


@pytest.mark.parametrize("t", [0.1, 0.8, 4.0])
def test_posterior_noise_has_the_posteriors_covariance(t: float) -> None:
    """Mean 0, covariance and a normal's fourth moment, to 4.5 standard errors."""
    n = 20_000
    for row in noisy(made(), t, 2, seed=4):
        field = made().posterior_noise(row.expand(n, *SHAPE), t, key())
        assert field.shape == (n, *SHAPE)
        field, covariance = field.flatten(1).numpy(), dense(made(), row, t)[1]
        for values, expected in (
            (field, 0.0),
            (np.einsum("bi,bj->bij", field, field), covariance),
            (field**4, 3 * covariance.diagonal() ** 2),
        ):
            error = (values.mean(0) - expected) / (values.std(0) / n**0.5)
            assert np.abs(error).max() < 4.5


def test_posterior_draws_of_one_point_are_independent() -> None:
    """The covariance of draws 1 and 2 given x_t is 0, to 4.5 standard errors."""
    n, row = 20_000, noisy(made(), 0.8, 1, seed=4)
    draws = made().posterior_draws(row.expand(n, *SHAPE), 0.8, key(), 2)
    one, other = (draws - made().denoiser(row, 0.8)).flatten(2).numpy()
    products = np.einsum("bi,bj->bij", one, other)
    assert np.abs(products.mean(0) / (products.std(0) / n**0.5)).max() < 4.5


def test_samples_have_the_mixtures_moments() -> None:
    n, mixture = 100_000, made()
    x = mixture.sample(n, seeded()).flatten(1).double().numpy()
    w, m = mixture.log_weights.exp().numpy(), mixture.means.numpy()
    mean = w @ m
    covariance = np.einsum("k,kij->ij", w, covariances(mixture)) + np.einsum(
        "k,ki,kj->ij", w, m - mean, m - mean
    )
    offsets = x - mean
    assert np.abs(offsets.mean(0) / (offsets.std(0) / n**0.5)).max() < 4.5
    products = np.einsum("bi,bj->bij", offsets, offsets)
    assert np.abs((products.mean(0) - covariance) / (products.std(0) / n**0.5)).max() < 4.5
    pooled = np.trace(covariance) / D + mean.var()  # of all coordinates about their common mean
    assert mixture.std() == pytest.approx(pooled**0.5, rel=1e-12)


@pytest.mark.parametrize("t", [0.002, 0.4, 80.0])
def test_float32_points_lose_nothing_but_their_own_rounding(t: float) -> None:
    x_t = noisy(made(), t, 50).float()
    for name in ("log_density", "score", "denoiser", "posterior_variance"):
        single = getattr(made(), name)(x_t, t)
        double = getattr(made(), name)(x_t.double(), t)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, double.float(), rtol=0, atol=0)
    for random in (
        made().posterior_draws(x_t, t, key(), 1),
        made().posterior_noise(x_t, t, key()),
    ):
        assert random.dtype == torch.float32 and random.isfinite().all()


def test_levels_may_differ_by_row_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixture, x_t = made(), noisy(made(), 0.7, 7)
    t = torch.tensor(LEVELS + [0.3])
    names = ("log_density", "component", "score", "denoiser", "posterior_variance")
    whole = [getattr(mixture, name)(x_t, t) for name in names]

    def drawn() -> list[torch.Tensor]:
        return [
            mixture.sample(7, seeded()),
            mixture.posterior_draws(x_t, t, key(), 2),
            mixture.posterior_noise(x_t, t, key()),
        ]

    whole_draws = drawn()
    rows = [
        torch.cat([getattr(mixture, name)(x_t[i : i + 1], t[i : i + 1]) for i in range(7)])
        for name in names
    ]
    monkeypatch.setattr(lowrank, "CHUNK", 2 * (2 * K * (RANK + 1) + D))  # two or three rows
    cut = [getattr(mixture, name)(x_t, t) for name in names]
    for a, b, c in zip(whole, rows, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)
    for a, b in zip(whole_draws, drawn(), strict=True):
        torch.testing.assert_close(a, b)


def test_at_t_zero_the_posterior_is_the_point_itself() -> None:
    x = made().sample(5, seeded())
    assert torch.equal(made().denoiser(x, 0.0), x)
    assert torch.equal(made().posterior_draws(x, 0.0, key(), 1)[0], x)
    assert made().posterior_noise(x, 0.0, key()).abs().max() == 0
    assert made().posterior_variance(x, 0.0).abs().max() == 0


def test_one_components_flow_is_the_gaussians() -> None:
    """m + (S + r^2)^(1/2) (S + t^2)^(-1/2) (x - m), and second order in the steps."""
    mixture = made(components=1)
    x_t = noisy(mixture, 5.0, 6)
    m, S = mixture.means[0].numpy(), covariances(mixture)[0]
    after, before = (linalg.sqrtm(S + level**2 * np.eye(D)) for level in (0.002, 5.0))
    exact = m + (x_t.flatten(1).numpy() - m) @ np.linalg.inv(before) @ after
    levels = torch.tensor([[[5.0]], [[0.002]]], dtype=torch.float64)
    errors = [
        np.abs(heun(mixture.score, x_t.flatten(1), *levels, steps).numpy() - exact).mean()
        for steps in (256, 512)
    ]
    found = mixture.ode_map(x_t, 5.0, 0.002).flatten(1).numpy()
    assert np.abs(found - exact).mean() == errors[0] < 1e-4 and 3 < errors[0] / errors[1] < 5


def test_ode_map_of_a_mixture_is_scipys() -> None:
    mixture, x_t = made(), noisy(made(), 3.0, 2)

    def slope(level: float, x: np.ndarray) -> np.ndarray:
        return -level * mixture.score(torch.from_numpy(x)[None], level)[0].numpy()

    for row, found in zip(x_t, mixture.ode_map(x_t, 3.0, 0.01), strict=True):
        path = integrate.solve_ivp(slope, (3.0, 0.01), row.flatten().numpy(), rtol=1e-8, atol=1e-9)
        assert found.flatten().numpy() == pytest.approx(path.y[:, -1], abs=2e-3)


def test_draws_depend_on_the_generator_or_key_alone() -> None:
    state = torch.get_rng_state()
    draws = [made().sample(7, seeded(seed)) for seed in (3, 3, 4)]
    again = [made().posterior_draws(draws[0], 0.5, key(seed), 2) for seed in (3, 3, 4)]
    fields = [made().posterior_noise(draws[0], 0.5, key(seed)) for seed in (3, 3, 4)]
    for first, same, other in (draws, again, fields):
        assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
