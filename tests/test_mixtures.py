"""Every closed form of the mixture against something that does not share its formula.

The references are scipy's densities and quadrature, automatic differentiation, Monte Carlo with
standard errors, a high-order ODE solver, and product distributions whose flow is known.
"""

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from tweedie import covariance

from study.errors import StudyError
from study.mixtures import GaussianMixture, heun

LEVELS = [0.002, 0.05, 0.4, 1.0, 5.0, 80.0]
PLANE = dict(
    means=[[-1.0, 0.2], [0.7, 0.9], [0.3, -1.1]], stds=[0.2, 0.1, 0.35], weights=[1, 2, 3]
)
LINE = dict(means=[[-1.0], [1.0], [1.4]], stds=[0.05, 0.08, 0.3], weights=[0.5, 0.3, 0.2])


def plane() -> GaussianMixture:
    return GaussianMixture.from_lists(**PLANE, dtype=torch.float64)


def line() -> GaussianMixture:
    return GaussianMixture.from_lists(**LINE, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def key(number: int = 1) -> torch.Tensor:
    return torch.tensor(number)


def noisy(mixture: GaussianMixture, t: float, n: int, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    x = mixture.sample(n, generator)
    return x + t * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def line_density(x: float) -> float:
    """p_0 of LINE by scipy, for quadrature."""
    parts = zip(LINE["means"], LINE["stds"], LINE["weights"], strict=True)
    return sum(w * stats.norm.pdf(x, m[0], s) for m, s, w in parts)


@pytest.mark.parametrize("t", [0.0, *LEVELS])
def test_log_density_is_scipys(t: float) -> None:
    x_t = noisy(plane(), t, 50)
    parts = zip(PLANE["means"], PLANE["stds"], PLANE["weights"], strict=True)
    density = sum(
        w / 6 * stats.multivariate_normal(m, (s**2 + t**2) * np.eye(2)).pdf(x_t.numpy())
        for m, s, w in parts
    )
    assert plane().log_density(x_t, t).numpy() == pytest.approx(np.log(density), rel=1e-9)


@pytest.mark.parametrize("t", [0.0, *LEVELS])
def test_score_is_the_gradient_of_log_density(t: float) -> None:
    x_t = noisy(plane(), t, 50).requires_grad_()
    (gradient,) = torch.autograd.grad(plane().log_density(x_t, t).sum(), x_t)
    torch.testing.assert_close(plane().score(x_t.detach(), t), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0, 5.0])
def test_moments_of_the_posterior_are_bayes_by_quadrature(t: float) -> None:
    grid = np.linspace(-2, 4, 60001)
    prior = line_density(grid)
    x_t = torch.tensor([[-1.3], [-0.2], [0.01], [0.9], [2.5]], dtype=torch.float64)
    mean, variance = line().denoiser(x_t, t)[:, 0], line().posterior_variance(x_t, t)
    for row, value in enumerate(x_t[:, 0].tolist()):
        joint = prior * stats.norm.pdf(value, grid, t)
        total = integrate.simpson(joint, x=grid)
        first = integrate.simpson(joint * grid, x=grid) / total
        second = integrate.simpson(joint * (grid - first) ** 2, x=grid) / total
        assert mean[row].item() == pytest.approx(first, rel=1e-7)
        assert variance[row].item() == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("t", LEVELS)
def test_tweedie_first_and_second_order(t: float) -> None:
    x_t = noisy(plane(), t, 30)
    tweedie = x_t + t**2 * plane().score(x_t, t)
    torch.testing.assert_close(plane().denoiser(x_t, t), tweedie, rtol=1e-9, atol=1e-9)
    trace = covariance(plane(), x_t, t).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(plane().posterior_variance(x_t, t), trace, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("t", [0.1, 0.6, 3.0])
def test_posterior_draws_have_the_posteriors_moments(t: float) -> None:
    n = 40_000
    x_t = noisy(plane(), t, 3, seed=4)
    for row in x_t:
        rows = row[None]
        draws = plane().posterior_draws(rows, t, key(), n)
        assert draws.shape == (n, 1, 2)
        draws = draws[:, 0]
        mean, expected = plane().denoiser(rows, t), covariance(plane(), rows, t)[0]
        error = (draws.mean(0) - mean[0]) / (draws.std(0) / n**0.5)
        assert error.abs().max() < 4
        products = torch.einsum("bi,bj->bij", draws - mean, draws - mean)
        error = (products.mean(0) - expected) / (products.std(0) / n**0.5)
        assert error.abs().max() < 4


@pytest.mark.parametrize("t", [0.1, 0.6, 3.0])
def test_posterior_noise_has_the_posteriors_covariance(t: float) -> None:
    """Mean 0, covariance and a normal's fourth moment, to 4.5 standard errors; in rings, whose
    centres are one, all of it lies within the components."""
    n = 40_000
    rings = GaussianMixture.from_lists([[0, 0]] * 2, [0.5, 2.0], [1, 1], torch.float64)
    for mixture, row in [
        *((plane(), row) for row in noisy(plane(), t, 3, seed=4)),
        (rings, torch.tensor([0.3, -0.8]).double()),
    ]:
        field = mixture.posterior_noise(row.expand(n, 2), t, key())
        second = covariance(mixture, row[None], t)[0]
        products = torch.einsum("bi,bj->bij", field, field)
        for values, expected in (
            (field, torch.zeros(2)),
            (products, second),
            (field**4, 3 * second.diagonal() ** 2),
        ):
            error = (values.mean(0) - expected) / (values.std(0) / n**0.5)
            assert error.abs().max() < 4.5


def test_posterior_draws_of_one_point_are_independent() -> None:
    """The covariance of draws 1 and 2 given x_t is 0, to 4.5 standard errors."""
    n, row = 40_000, noisy(plane(), 0.6, 1, seed=4)
    draws = plane().posterior_draws(row.expand(n, 2), 0.6, key(), 2)
    one, other = draws - plane().denoiser(row, 0.6)
    products = torch.einsum("bi,bj->bij", one, other)
    assert (products.mean(0) / (products.std(0) / n**0.5)).abs().max() < 4.5


@pytest.mark.parametrize("t", [0.05, 0.4, 2.0])
def test_posterior_draws_at_noisy_data_are_data_again(t: float) -> None:
    """If x_t is noisy data and x' ~ p(x | x_t), then (x', x_t) is distributed as (x, x_t)."""
    mixture, generator = line(), seeded(2)
    x = mixture.sample(20_000, generator)
    x_t = x + t * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    redrawn = mixture.posterior_draws(x_t, t, key(), 1)[0]
    fresh = mixture.sample(20_000, generator)
    assert stats.ks_2samp(redrawn[:, 0], fresh[:, 0]).pvalue > 1e-3
    assert stats.kstest((x_t - redrawn)[:, 0] / t, "norm").pvalue > 1e-3


def test_samples_follow_the_density_and_std_is_theirs() -> None:
    x = line().sample(50_000, seeded())[:, 0].numpy()

    def cdf(values: np.ndarray) -> np.ndarray:
        parts = zip(LINE["means"], LINE["stds"], LINE["weights"], strict=True)
        return sum(w * stats.norm.cdf(values, m[0], s) for m, s, w in parts)

    assert stats.kstest(x, cdf).pvalue > 1e-3
    second, _ = integrate.quad(lambda v: v**2 * line_density(v), -3, 4, limit=400, points=[-1, 1])
    first, _ = integrate.quad(lambda v: v * line_density(v), -3, 4, limit=400, points=[-1, 1])
    assert line().std() == pytest.approx((second - first**2) ** 0.5, rel=1e-7)
    far = GaussianMixture.from_lists([[2.0, -1.0], [3.0, 0.0]], [0.1, 0.4], [1, 3])
    pooled = far.sample(200_000, seeded()).std().item()
    assert far.std() == pytest.approx(pooled, rel=0.01)


def solved(mixture: GaussianMixture, x_t: torch.Tensor, t: float, r: float) -> np.ndarray:
    """dx/dt = (x - D) / t by scipy's eighth-order solver, rows of x_t one by one."""

    def slope(level: float, x: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(x)[None]
        return ((x - mixture.denoiser(x, level)) / level)[0].numpy()

    return np.stack(
        [
            integrate.solve_ivp(slope, (t, r), row.numpy(), "DOP853", rtol=1e-11, atol=1e-12).y[
                :, -1
            ]
            for row in x_t
        ]
    )


@pytest.mark.parametrize(("t", "r"), [(2.0, 0.02), (0.3, 0.01), (0.01, 1.0)])
def test_quantile_map_solves_the_ode(t: float, r: float) -> None:
    x_t = torch.linspace(-2, 2.5, 12, dtype=torch.float64)[:, None]
    expected = solved(line(), x_t, t, r)
    assert line().ode_map(x_t, t, r).numpy() == pytest.approx(expected, abs=1e-7)


def test_quantile_map_keeps_both_tails() -> None:
    """Up to 70 standard deviations out, where F and 1 - F underflow in float64."""
    mixture = GaussianMixture.from_lists([[-1.0], [1.0]], [0.05, 0.05], [1, 1], torch.float64)
    x_t = torch.tensor([[-8.0], [-3.0], [3.0], [8.0]], dtype=torch.float64)
    y = mixture.ode_map(x_t, 0.1, 0.002)
    assert y.numpy() == pytest.approx(-y.flip(0).numpy(), rel=1e-12)
    assert y.numpy() == pytest.approx(solved(mixture, x_t, 0.1, 0.002), rel=1e-8)
    back = mixture.ode_map(y, 0.002, 0.1)
    assert back.numpy() == pytest.approx(x_t.numpy(), rel=1e-12)


def test_quantile_map_in_the_gap_between_modes() -> None:
    """There F is flat to float64 (the density is about 1e-17), which must not cost digits."""
    mixture = GaussianMixture.from_lists([[-1.0], [1.0]], [0.05, 0.05], [1, 1], torch.float64)
    x_t = torch.tensor([[-0.1], [-0.01], [0.0], [0.003], [0.08]], dtype=torch.float64)
    y = mixture.ode_map(x_t, 0.1, 0.08)
    assert y.numpy() == pytest.approx(solved(mixture, x_t, 0.1, 0.08), abs=1e-8)


def test_ode_map_carries_one_density_into_the_other() -> None:
    x_t = torch.linspace(-150, 150, 9, dtype=torch.float64)[:, None]
    y = line().ode_map(x_t, 80.0, 0.002)
    for before, after in zip(x_t[:, 0].tolist(), y[:, 0].tolist(), strict=True):
        quantiles = [
            sum(
                w * stats.norm.cdf(x, m[0], (s**2 + level**2) ** 0.5)
                for m, s, w in zip(LINE["means"], LINE["stds"], LINE["weights"], strict=True)
            )
            for x, level in ((before, 80.0), (after, 0.002))
        ]
        assert quantiles[1] == pytest.approx(quantiles[0], rel=1e-9)


def test_one_component_is_affine() -> None:
    mixture = GaussianMixture.from_lists([[0.5, -2.0]], [0.5], [1], torch.float64)
    x_t = noisy(mixture, 3.0, 4)
    expected = solved(mixture, x_t, 3.0, 0.05)
    assert mixture.ode_map(x_t, 3.0, 0.05).numpy() == pytest.approx(expected, abs=1e-8)


def test_heun_in_the_plane_meets_a_product_whose_flow_is_exact() -> None:
    """Equal stds and means on one axis: a 1-D mixture beside a Gaussian, two exact flows."""
    flat = GaussianMixture.from_lists([[-1, 0.5], [1, 0.5]], [0.2, 0.2], [1, 3], torch.float64)
    across = GaussianMixture.from_lists([[-1], [1]], [0.2, 0.2], [1, 3], torch.float64)
    beside = GaussianMixture.from_lists([[0.5]], [0.2], [1], torch.float64)
    x_t = noisy(flat, 80.0, 200)
    exact = torch.cat(
        [across.ode_map(x_t[:, :1], 80.0, 0.002), beside.ode_map(x_t[:, 1:], 80.0, 0.002)], 1
    )
    levels = torch.tensor([[[80.0]], [[0.002]]], dtype=torch.float64)
    errors = [
        (heun(flat.score, x_t, *levels, steps) - exact).abs().mean().item() for steps in (256, 512)
    ]
    assert (flat.ode_map(x_t, 80.0, 0.002) - exact).abs().mean().item() == errors[0] < 1e-3
    assert 3 < errors[0] / errors[1] < 5  # second order


@pytest.mark.parametrize("mixture", [line(), plane()], ids=["line", "plane"])
def test_levels_may_differ_by_row_and_the_map_to_its_own_level_is_the_identity(
    mixture: GaussianMixture,
) -> None:
    x_t = noisy(mixture, 0.7, 3)
    t, r = torch.tensor([0.5, 0.7, 2.0]).double(), torch.tensor([0.1, 0.7, 5.0]).double()
    together = mixture.ode_map(x_t, t, r)
    alone = [mixture.ode_map(x_t[i : i + 1], t[i].item(), r[i].item()) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[1], x_t[1], rtol=1e-12, atol=1e-12)
    together = mixture.score(x_t, t)
    alone = [mixture.score(x_t[i : i + 1], t[i].item()) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("t", [0.0, 0.002, 80.0])
def test_float32_stays_finite_and_close_to_float64(t: float) -> None:
    single = GaussianMixture.from_lists(**PLANE)
    x_t = torch.cat([noisy(plane(), t, 40).float(), torch.tensor([[40.0, -90.0], [-300, 200.0]])])
    assert single.means.dtype == torch.float32
    for name in ("log_density", "score", "denoiser", "posterior_variance"):
        value = getattr(single, name)(x_t, t)
        expected = getattr(plane(), name)(x_t.double(), t)
        assert value.dtype == torch.float32 and value.isfinite().all()
        error = (value[:40] - expected[:40]).abs().max().item()
        assert error < 1e-4 * max(1.0, expected[:40].abs().max().item())
    assert single.posterior_draws(x_t, t, key(), 2).isfinite().all()
    assert single.posterior_noise(x_t, t, key()).isfinite().all()
    assert single.ode_map(x_t, max(t, 0.002), 0.002).isfinite().all()


def test_at_t_zero_the_posterior_is_the_point_itself() -> None:
    x = plane().sample(5, seeded())
    torch.testing.assert_close(plane().denoiser(x, 0.0), x)
    torch.testing.assert_close(plane().posterior_draws(x, 0.0, key(), 1)[0], x)
    assert plane().posterior_noise(x, 0.0, key()).abs().max() < 1e-12
    assert plane().posterior_variance(x, 0.0).abs().max() < 1e-30


def test_draws_depend_on_the_generator_or_key_alone() -> None:
    state = torch.get_rng_state()
    draws = [plane().sample(7, seeded(seed)) for seed in (3, 3, 4)]
    again = [plane().posterior_draws(draws[0], 0.5, key(seed), 2) for seed in (3, 3, 4)]
    fields = [plane().posterior_noise(draws[0], 0.5, key(seed)) for seed in (3, 3, 4)]
    for first, same, other in (draws, again, fields):
        assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": []}, "one or more points"),
        ({"means": [[0.0], [1.0, 2.0], [1.0]]}, r"dimensions \[1, 2\]"),
        ({"means": [[float("nan")], [1.0], [1.0]]}, "means must be finite"),
        ({"stds": [0.1, 0.1]}, "2 stds for 3 means"),
        ({"stds": [0.1, 0.0, 0.1]}, "stds must be finite and above 0"),
        ({"weights": [0.1, float("inf"), 0.1]}, "weights must be finite and above 0"),
    ],
)
def test_impossible_mixtures_are_refused(change: dict, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        GaussianMixture.from_lists(**{**LINE, **change})
