"""The fixed points against closed forms, exact composition, brute force and values on record.

On record is the equal mixture of N(-1, .05^2) and N(1, .05^2): Wasserstein-2 distance and share
between the modes (|y| < .8) of one-step outputs, by another program.
"""

from functools import cache

import numpy as np
import pytest
import torch

from study import oracle
from study.factors import L1, L2, Distance, Euler, Heun, L2Norm, PseudoHuber, Sigma, Solver
from study.mixtures import GaussianMixture

SIGMA = Sigma()


def mixture(*weights: float) -> GaussianMixture:
    return GaussianMixture.from_lists([[-1.0], [1.0]], [0.05, 0.05], weights, torch.float64)


def gaussian() -> GaussianMixture:
    return GaussianMixture.from_lists([[0.3]], [0.5], [1.0], torch.float64)


def three() -> GaussianMixture:
    return GaussianMixture.from_lists(
        [[-1.0], [0.4], [1.5]], [0.3, 0.05, 0.2], [0.3, 0.2, 0.5], torch.float64
    )


@cache
def trained(
    N: int, distance: Distance, draws: int = 1, minority: float = 0.5, fineness: float = 1.0
) -> dict:
    density = mixture(minority, 1 - minority)
    f = oracle.consistency_training(density, SIGMA, N, distance, draws, fineness)
    return oracle.pushforward(f(oracle.quantiles(SIGMA, 20_000), 80.0), density, SIGMA, 4.0)


def distilled(N: int, solver: Solver) -> dict:
    f = oracle.consistency_distillation(mixture(1, 1), SIGMA, N, solver)
    return oracle.pushforward(f(oracle.quantiles(SIGMA, 20_000), 80.0), mixture(1, 1), SIGMA, 4.0)


def same(found: dict, w2: float, between: float) -> None:
    """To half a unit of the last digit on record, and 2e-4 for the two programs' grids."""
    assert found["w2"] == pytest.approx(w2, abs=7e-4)
    assert found["between"] == pytest.approx(between, abs=7e-4)


# --- closed forms ---


@pytest.mark.parametrize(
    ("N", "euler", "heun"),
    [(18, 0.846, 1.055), (40, 0.930, 1.010), (150, 0.981, 1.0006), (1280, 0.998, 1.00001)],
)
def test_gains_on_gaussian_data(N: int, euler: float, heun: float) -> None:
    """The share of the true standard deviation that one step reproduces."""
    x = oracle.quantiles(SIGMA, 8)
    truth = (gaussian().ode_map(x[:, None], 80.0, 0.002)[:, 0] - 0.3) / (x - 0.3)

    def gain(solver: Solver) -> np.ndarray:
        y = oracle.consistency_distillation(gaussian(), SIGMA, N, solver)(x, 80.0)
        return ((y - 0.3) / (x - 0.3) / truth).numpy()

    # a linear ODE, dx/dt = x t / (s^2 + t^2): the product of the solvers' own factors
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    t = (low + np.arange(N) / (N - 1) * (high - low)) ** 7
    slope = t / (0.25 + t**2)
    first = 1 - np.diff(t) * slope[1:]
    second = 1 - np.diff(t) * (slope[1:] + first * slope[:-1]) / 2
    exact = np.sqrt((0.25 + t[-1] ** 2) / (0.25 + t[0] ** 2))
    assert gain(Euler()) == pytest.approx(first.prod() * exact, rel=1e-10)
    assert gain(Heun()) == pytest.approx(second.prod() * exact, rel=1e-10)
    assert gain(Euler()) == pytest.approx(euler, abs=5.1e-4)
    assert gain(Heun()) == pytest.approx(heun, abs=5.1e-4 if N < 100 else 4.5e-5)


@pytest.mark.parametrize("N", [18, 60])
@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(c0=0.03), L1()])
def test_on_gaussian_data_training_is_distillation(N: int, draws: int, distance: Distance) -> None:
    """f is affine and the posterior symmetric: every location of f_r(x_r) is f_r at its mean."""
    ct = oracle.consistency_training(gaussian(), SIGMA, N, distance, draws)
    cd = oracle.consistency_distillation(gaussian(), SIGMA, N, Euler())
    x = oracle.quantiles(SIGMA, 1001)
    for level in ct.levels[:: N // 6].tolist():
        at = 0.3 + x / 80 * (level**2 + 0.25) ** 0.5
        assert torch.allclose(ct(at, level), cd(at, level), rtol=0, atol=1e-9)


def test_first_level_is_the_identity() -> None:
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 4)
    for f in (
        oracle.consistency_training(mixture(1, 1), SIGMA, 5, L2()),
        oracle.consistency_training(mixture(1, 1), SIGMA, 5, L1()),
        oracle.consistency_distillation(mixture(1, 1), SIGMA, 5, Heun()),
    ):
        assert torch.equal(f(x, SIGMA.min), x)
        assert f(x, 80.0).shape == x.shape


def test_two_levels_under_l2_are_the_posterior_mean() -> None:
    """f_t(x) = E[x_r] = x + (r - t) (x - D) / t, in one step from f_r(x) = x."""
    x = oracle.quantiles(SIGMA, 400)
    ct = oracle.consistency_training(three(), SIGMA, 2, L2(), draws=3)(x, 80.0)
    cd = oracle.consistency_distillation(three(), SIGMA, 2, Euler())(x, 80.0)
    assert torch.allclose(ct, cd, rtol=0, atol=1e-6)


def test_distillation_approaches_the_exact_map() -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    level = float(oracle.grid(three(), SIGMA, 401)[260])
    exact = three().ode_map(x[:, None], level, SIGMA.min)[:, 0]
    coarse = oracle.consistency_distillation(three(), SIGMA, 401, Heun())(x, level)
    fine = oracle.consistency_distillation(three(), SIGMA, 801, Heun())(x, level)
    error, less = ((y - exact).abs().max() for y in (coarse, fine))
    assert less < 1e-3
    assert error / less == pytest.approx(4, rel=0.3)  # second order


def test_pushforward_of_exact_quantiles() -> None:
    """Data quantiles have no distance, shifted ones the shift; order does not matter."""
    grid = np.linspace(-4, 4, 400_001)
    wide = GaussianMixture.from_lists(
        [[-1.0], [0.4], [1.5]],
        [(s * s + SIGMA.min**2) ** 0.5 for s in (0.3, 0.05, 0.2)],
        [0.3, 0.2, 0.5],
        torch.float64,
    )
    mass = np.exp(wide.log_density(torch.from_numpy(grid)[:, None], 0.0).numpy()) * 2e-5
    y = np.interp((np.arange(5000) + 0.5) / 5000, mass.cumsum() - mass / 2, grid)
    turned = oracle.pushforward(y[::-1].copy(), three(), SIGMA, 4.0)
    assert turned["w2"] < 1e-6
    moved = oracle.pushforward(torch.from_numpy(y) + 0.25, three(), SIGMA, 4.0)
    assert moved["w2"] == pytest.approx(0.25, abs=1e-6)
    assert sum(moved["masses"]) == pytest.approx(1)


def test_pushforward_counts() -> None:
    y = [-1.1, -0.9, -0.79, 0.1, 0.81, 1.19, 1.21, 0.95]
    found = oracle.pushforward(y, mixture(1, 1), SIGMA, 4.0)
    assert found["between"] == 3 / 8
    assert found["masses"] == [3 / 8, 5 / 8]


def test_prior_quantiles() -> None:
    x = oracle.quantiles(SIGMA, 100_000)
    assert x.dtype == torch.float64 and bool((x.diff() > 0).all())
    assert float(x.std()) == pytest.approx(80, rel=1e-4)


# --- brute force ---


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(c0=0.05), L2Norm()])
def test_one_level_against_sampling(distance: Distance, draws: int) -> None:
    """f_t(x) is the location of f_r(x_r): over draws of the data, weighted by what noise would
    make x of them, the gradient of the loss is 0."""
    f = oracle.consistency_training(three(), SIGMA, 12, distance, draws)
    generator, n = torch.Generator().manual_seed(7), 8_000
    data = three().sample(500_000, generator)[:, 0]
    for i in (4, 6, 8):
        r, t = f.levels[i - 1 : i + 1].tolist()
        for x in (-0.6 * (1 + t * t) ** 0.5, 0.1, 0.8 + t):
            weights = torch.exp(-((x - data) ** 2) / (2 * t * t))
            rows = torch.multinomial(weights, n * draws, replacement=True, generator=generator)
            D = data[rows].reshape(n, draws).mean(1)
            u = f(x + (r - t) * (x - D) / t, r) - f(torch.tensor(x), t)
            match distance:
                case PseudoHuber(c0=c):
                    u = u / (u * u + c * c).sqrt()
                case L2Norm():
                    u = u.sign()
            assert abs(float(u.mean())) < 4.5 * float(u.std()) / n**0.5


def test_law_of_the_mean_of_draws() -> None:
    """Mean and variance are D and Cov / K of the mixture's own formulas."""
    x = torch.linspace(-3, 4, 50, dtype=torch.float64)
    for draws in (1, 2, 7):
        weights, centres, stds = oracle.mean_of_draws(
            three(), oracle.hits(three(), draws), x.numpy(), 0.7
        )
        mean = (weights * centres).sum(1)
        variance = (weights * (centres**2 + stds**2)).sum(1) - mean**2
        assert weights.sum(1) == pytest.approx(1, abs=1e-12)
        assert mean == pytest.approx(three().denoiser(x[:, None], 0.7)[:, 0].numpy(), abs=1e-12)
        exact = three().posterior_variance(x[:, None], 0.7).numpy() / draws
        assert variance == pytest.approx(exact, abs=1e-12)


# --- convergence and limits ---


@pytest.mark.parametrize(
    ("N", "distance", "draws"),
    [(18, L2(), 1), (18, L2(), 16), (150, L2(), 1), (18, PseudoHuber(c0=0.03), 1)],
)
def test_refinement_changes_nothing(N: int, distance: Distance, draws: int) -> None:
    once, finer = trained(N, distance, draws), trained(N, distance, draws, fineness=2.0)
    assert once["w2"] == pytest.approx(finer["w2"], abs=1e-4)
    assert once["between"] == pytest.approx(finer["between"], abs=1.5e-4)


def test_interior_levels_converge_and_increase() -> None:
    once, finer = (
        oracle.consistency_training(mixture(0.2, 0.8), SIGMA, 40, L2(), fineness=fineness)
        for fineness in (1.0, 3.0)
    )
    for t in once.levels[::6].tolist():
        x = torch.linspace(-5, 5, 4001, dtype=torch.float64) * (1 + t)
        assert torch.allclose(once(x, t), finer(x, t), rtol=0, atol=1e-3)
        assert bool((once(x, t).diff() >= 0).all())


def test_pseudo_huber_runs_from_the_mean_to_the_median() -> None:
    """Tables with pseudo-Huber's jumps against the median's exact composition."""
    x = oracle.quantiles(SIGMA, 2000)

    def outputs(distance: Distance) -> torch.Tensor:
        return oracle.consistency_training(mixture(0.2, 0.8), SIGMA, 18, distance)(x, 80.0)

    median = outputs(L1())
    assert torch.equal(median, outputs(L2Norm()))
    apart = [float((outputs(PseudoHuber(c0=c)) - median).abs().mean()) for c in (0.1, 0.01, 1e-3)]
    assert apart[0] > 4 * apart[1] > 16 * apart[2]
    assert float((outputs(PseudoHuber(c0=1e-6)) - median).abs().mean()) < 6e-4
    assert torch.allclose(outputs(PseudoHuber(c0=1e3)), outputs(L2()), rtol=0, atol=2e-3)


def test_share_between_falls_with_the_root_of_draws_and_levels() -> None:
    shares = {(N, K): trained(N, L2(), K)["between"] for N, K in ((150, 1), (150, 4), (150, 64))}
    shares |= {(N, K): trained(N, L2(), K)["between"] for N, K in ((640, 1), (640, 2), (1280, 1))}
    slope, _ = np.polyfit(
        [np.log(N * K) for N, K in shares], [np.log(share) for share in shares.values()], 1
    )
    assert slope == pytest.approx(-0.5, abs=0.05)
    assert shares[640, 2] == pytest.approx(shares[1280, 1], rel=0.01)
    assert shares[150, 4] * 600**0.5 == pytest.approx(shares[640, 1] * 640**0.5, rel=0.02)


# --- values on record ---


@pytest.mark.parametrize(
    ("N", "w2", "between"),
    [(18, 0.431, 0.552), (40, 0.338, 0.373), (150, 0.235, 0.200), (1280, 0.134, 0.074)],
)
def test_training_under_l2(N: int, w2: float, between: float) -> None:
    same(trained(N, L2()), w2, between)


@pytest.mark.parametrize(
    ("N", "draws", "between"),
    [(18, 2, 0.388), (18, 4, 0.294), (18, 16, 0.161), (18, 64, 0.087)]
    + [(150, 2, 0.145), (150, 4, 0.105), (150, 16, 0.055), (150, 64, 0.029)],
)
def test_training_on_means_of_draws(N: int, draws: int, between: float) -> None:
    assert trained(N, L2(), draws)["between"] == pytest.approx(between, abs=7e-4)


@pytest.mark.parametrize(
    ("solver", "N", "w2", "between"),
    [(Euler(), 18, 0.0258, 0.0144), (Euler(), 40, 0.0101, 0.0024), (Euler(), 150, 0.0027, 0.0002)]
    + [(Heun(), 18, 0.0076, 0.0001), (Heun(), 40, 0.0017, 0.0002)],
)
def test_distillation(solver: Solver, N: int, w2: float, between: float) -> None:
    """The record's distances end at .0009, from its own quantiles; these go on to 5e-6."""
    found = distilled(N, solver)
    assert (found["w2"] ** 2 + 0.0009**2) ** 0.5 == pytest.approx(w2, abs=1e-4)
    assert found["between"] == pytest.approx(between, abs=2.1e-4)


@pytest.mark.parametrize(
    ("N", "c", "w2", "between"),
    [(40, 0.3, 0.295, 0.305), (40, 0.03, 0.135, 0.092), (150, 0.03, 0.129, 0.082)]
    + [(40, 0.001, 0.0297, 0.0026)],  # on record .032, .003, as on a coarser grid
)
def test_training_under_pseudo_huber(N: int, c: float, w2: float, between: float) -> None:
    same(trained(N, PseudoHuber(c0=c)), w2, between)


@pytest.mark.parametrize(("c", "minority"), [(0.03, 0.0685), (0.001, 0.0544)])
def test_a_robust_distance_takes_from_the_minority(c: float, minority: float) -> None:
    """Of a true share of .2; L2 leaves it."""
    found = trained(150, PseudoHuber(c0=c), minority=0.2)
    assert found["masses"][0] == pytest.approx(minority, abs=2e-4)
    assert trained(150, L2(), minority=0.2)["masses"][0] == pytest.approx(0.2, abs=2e-3)


# --- refusals ---


def test_what_is_refused() -> None:
    plane = GaussianMixture.from_lists([[0.0, 1.0]], [1.0], [1.0])
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="one dimension, not 2"):
        oracle.consistency_training(plane, SIGMA, 18, L2())
    with pytest.raises(ValueError, match="one dimension, not 2"):
        oracle.consistency_distillation(plane, SIGMA, 18, Euler())
    with pytest.raises(ValueError, match="one dimension, not 2"):
        oracle.pushforward(x, plane, SIGMA, 4.0)
    with pytest.raises(ValueError, match="at least 2 levels"):
        oracle.consistency_distillation(mixture(1, 1), SIGMA, 1, Euler())
    with pytest.raises(ValueError, match="0 draws"):
        oracle.consistency_training(mixture(1, 1), SIGMA, 18, L2(), draws=0)
    with pytest.raises(ValueError, match="64 draws from 3 components"):
        oracle.consistency_training(three(), SIGMA, 18, L2(), draws=64)
    with pytest.raises(ValueError, match="no level of the grid"):
        oracle.consistency_distillation(mixture(1, 1), SIGMA, 18, Euler())(x, 1.0)
