"""Probes against Gaussians, two points and offsets whose answers can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

from study import data, subjects
from study.data import Dataset, to_float
from study.factors import Analytic, Empirical, Sigma, SingleSample, Teacher
from study.posterior import Posterior
from study.probes import map_error, mean_and_error, score_error, t_star
from study.scores import Knowledge
from study.subjects import Mixture

SIGMA = Sigma(data=1.0)
GAUSS = Mixture(means=((0.3, -1.0, 2.0),), std=0.5, held_out=8000)
TWO_MODES = Mixture(means=((-1.0,), (1.0,)), std=0.1, held_out=8000)
OFFSET = torch.tensor([0.3, -0.4, 1.2])  # |b|^2 = 1.69


@pytest.fixture(scope="module")
def gauss() -> Dataset:
    return data.load(GAUSS)


@pytest.fixture(scope="module")
def two_modes() -> Dataset:
    return data.load(TWO_MODES)


@pytest.fixture(scope="module")
def finite() -> Dataset:
    return data.load(Mixture(means=((-1.0,), (1.0,)), std=0.3, samples=60, held_out=4000))


def check(result: dict, name: str, expected: np.ndarray | float, errors: float = 4) -> None:
    """Within so many standard errors (and rounding) at every level, errors that mean something."""
    value, error = np.array(result[name]), np.array(result[f"{name}_se"])
    rounding = 1e-5 * np.array(result["sigma"]) ** 2 + 1e-12
    assert len(value) == len(result["sigma"])
    assert (np.abs(value - expected) <= errors * error + np.minimum(rounding, 1e-4)).all()
    scale = np.maximum(np.abs(expected), np.array(result["posterior_variance"]))
    assert (error <= 0.15 * scale + 1e-9).all()


def brute(dataset: Dataset, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the one-dimensional posterior over the training set, in float64."""
    x, x_t = dataset.train.double()[:, 0], x_t.double()
    w = (-((x_t - x) ** 2) / (2 * t**2)).softmax(1)
    mean = w @ x
    return mean, (w * (x - mean[:, None]) ** 2).sum(1)


def test_mean_and_error() -> None:
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(14 / 3) / 2)


# --- score error ---


def test_single_sample_on_a_gaussian(gauss: Dataset) -> None:
    """Cov[x | x_t] = s^2 t^2 / (s^2 + t^2) I; no bias; the held-out loss of D is its trace."""
    result = score_error(SingleSample(), Knowledge(), gauss, SIGMA, 9, 4000)
    assert result["sigma"] == pytest.approx(np.geomspace(0.002, 80, 9))
    t2 = np.array(result["sigma"]) ** 2
    trace = 3 * 0.25 * t2 / (0.25 + t2)
    check(result, "variance", trace)
    check(result, "bias2", 0.0)
    check(result, "held_out_loss", trace)
    assert result["posterior_variance"] == pytest.approx(trace, rel=1e-4)
    assert result["distance2"] == [None] * 9 and result["t_star"] is None
    assert result["known"] and result["dimension"] == 3


def test_single_sample_on_two_modes(two_modes: Dataset) -> None:
    """Variance E Tr Cov[x | x_t] by quadrature over x_t."""
    result = score_error(SingleSample(), Knowledge(), two_modes, SIGMA, 9, 6000)
    density, expected = two_modes.density.to(dtype=torch.float64), []
    for t in result["sigma"]:
        width = math.hypot(0.1, t)
        grid = np.linspace(-1 - 9 * width, 1 + 9 * width, 200_001)
        p = (stats.norm.pdf(grid, -1, width) + stats.norm.pdf(grid, 1, width)) / 2
        variance = density.posterior_variance(torch.from_numpy(grid)[:, None], t).numpy()
        expected.append(integrate.simpson(p * variance, x=grid))
    check(result, "variance", np.array(expected))
    check(result, "bias2", 0.0)
    check(result, "held_out_loss", np.array(expected))


def test_single_sample_on_a_finite_sample(finite: Dataset) -> None:
    """Variance is the empirical posterior's, and it is unbiased for that: its squared bias and
    distance are those of the empirical denoiser."""
    result = score_error(SingleSample(), Knowledge(), finite, SIGMA, 7, 4000)
    generator, expected, bias2 = torch.Generator().manual_seed(9), [], []
    for t in result["sigma"]:
        rows = torch.randint(60, (100_000,), generator=generator)
        x_t = finite.train[rows] + t * torch.randn((len(rows), 1), generator=generator)
        mean, variance = brute(finite, x_t, t)
        expected.append(variance.mean().item())
        truth = finite.density.to(dtype=torch.float64).denoiser(x_t.double(), t)[:, 0]
        bias2.append((mean - truth).square().mean().item())
    check(result, "variance", np.array(expected), errors=5)
    check(result, "bias2", np.array(bias2), errors=5)
    check(result, "distance2", 0.0)
    assert result["posterior_variance"] == pytest.approx(expected, rel=0.1, abs=1e-9)
    assert max(bias2) > 1e-3  # a sample of 60 does differ from its population


def test_empirical_has_no_variance_and_no_distance(finite: Dataset) -> None:
    known = Knowledge(law=Posterior(finite.train))
    result = score_error(Empirical(), known, finite, SIGMA, 5, 500)
    assert result["variance"] == result["variance_se"] == [0.0] * 5
    assert max(result["distance2"]) < 1e-10
    assert max(result["bias2"]) > 1e-3


def test_a_teacher_that_is_off_by_b_has_squared_bias_b2_and_no_variance(gauss: Dataset) -> None:
    known = Knowledge(teachers={"edm": lambda x_t, t: gauss.density.denoiser(x_t, t) + OFFSET})
    result = score_error(Teacher(run="edm"), known, gauss, SIGMA, 7, 8000)
    assert result["variance"] == result["variance_se"] == [0.0] * 7
    assert result["bias2"] == pytest.approx([1.69] * 7, rel=1e-4)
    t2 = np.array(result["sigma"]) ** 2
    check(result, "held_out_loss", 3 * 0.25 * t2 / (0.25 + t2) + 1.69)


def test_a_teacher_on_a_finite_sample_has_its_distance_to_the_empirical_mean(
    finite: Dataset,
) -> None:
    posterior = Posterior(finite.train)
    known = Knowledge(teachers={"edm": lambda x_t, t: posterior.denoiser(x_t, t) - 0.5})
    result = score_error(Teacher(run="edm"), known, finite, SIGMA, 5, 500)
    assert result["distance2"] == pytest.approx([0.25] * 5, rel=1e-4)


def test_analytic_on_held_out_data_loses_the_posterior_variance(gauss: Dataset) -> None:
    known = Knowledge(density=gauss.density)
    result = score_error(Analytic(), known, gauss, SIGMA, 7, 8000)
    assert result["variance"] == result["bias2"] == [0.0] * 7
    t2 = np.array(result["sigma"]) ** 2
    check(result, "held_out_loss", 3 * 0.25 * t2 / (0.25 + t2))


def test_images_have_no_known_population() -> None:
    digits = data.load(subjects.Digits())
    known = Knowledge(law=Posterior(to_float(digits.train)))
    sigma = Sigma(min=0.05, max=5.0)  # t* is about 0.3
    result = score_error(SingleSample(), known, digits, sigma, 3, 400)
    assert result["bias2"] == result["bias2_se"] == [None] * 3
    assert not result["known"] and result["dimension"] == 64
    assert result["variance"][0] == 0.0  # below t* a second draw is the same image
    assert result["sigma"][0] < result["t_star"] < result["sigma"][1]
    check(result, "distance2", 0.0)


# --- t* ---


def points(*values: float) -> Dataset:
    train = torch.tensor(values)[:, None]
    return Dataset(train, train, (1,), 1.0, "")


def test_t_star_of_two_points() -> None:
    """+-1: the own weight of 1 at x_t = 1 + t z is 1 / (1 + exp(-2 (1 + t z) / t^2))."""

    def own(t: float) -> float:
        return integrate.quad(
            lambda z: special.expit(2 * (1 + t * z) / t**2) * stats.norm.pdf(z), -9, 9
        )[0]

    exact = optimize.brentq(lambda t: own(t) - 0.99, 0.1, 2)
    assert 0.3 < exact < 0.6
    # 1 % from the bisection, the rest from 256 points
    assert t_star(points(-1.0, 1.0), SIGMA) == pytest.approx(exact, rel=0.12)
    assert t_star(points(-10.0, 10.0), SIGMA) == pytest.approx(10 * exact, rel=0.12)


def test_t_star_at_its_ends(two_modes: Dataset) -> None:
    assert t_star(points(0.0, 1e-4), SIGMA) == 0.0  # never a point
    assert t_star(points(3.0), SIGMA) == pytest.approx(80.0)  # always one
    assert t_star(two_modes, SIGMA) is None


# --- map error ---


def test_map_error_of_the_gaussians_map_and_of_one_beside_it(gauss: Dataset) -> None:
    """The flow of N(m, s^2 I) from t to e: m + sqrt((s^2 + e^2) / (s^2 + t^2)) (x - m)."""
    m = torch.tensor(GAUSS.means[0])

    def flow(x: Tensor, t: Tensor) -> Tensor:
        gain = ((0.25 + SIGMA.min**2) / (0.25 + t**2)).sqrt()
        return m + gain[:, None] * (x - m)

    exact = map_error(flow, gauss, SIGMA, 5, 300)
    assert exact["sigma"] == pytest.approx(np.geomspace(0.002, 80, 6)[1:])
    assert max(exact["rms"]) < 1e-5 and exact["value"] < 1e-5
    beside = map_error(lambda x, t: flow(x, t) + OFFSET, gauss, SIGMA, 5, 300)
    assert beside["rms"] == pytest.approx([math.sqrt(1.69 / 3)] * 5, rel=1e-4)
    assert beside["value"] == pytest.approx(math.sqrt(1.69 / 3), rel=1e-4)
    half = map_error(lambda x, t: flow(x, t) + 2.0 * (t > 10)[:, None], gauss, SIGMA, 2, 100)
    assert half["rms"] == pytest.approx([0.0, 2.0], abs=1e-5)
    assert half["value"] == pytest.approx(math.sqrt(2.0), rel=1e-5)


def test_map_error_sees_points_of_the_noisy_data(gauss: Dataset) -> None:
    """x_t ~ N(m, s^2 + t^2), and f = m leaves the flow's own spread, sqrt(s^2 + e^2)."""
    m = torch.tensor(GAUSS.means[0])
    result = map_error(lambda x, t: m.expand_as(x), gauss, SIGMA, 4, 20_000)
    assert result["rms"] == pytest.approx([0.5] * 4, rel=4 / math.sqrt(2 * 60_000))


def test_map_error_of_two_modes(two_modes: Dataset) -> None:
    """At large t the sign decides the mode: f = sign(x) misses the spread within it alone."""
    result = map_error(lambda x, t: x.sign(), two_modes, SIGMA, 3, 20_000)
    assert result["rms"][-1] == pytest.approx(math.hypot(0.1, 0.002), rel=0.03)
