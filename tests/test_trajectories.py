"""Trajectories of Gaussians and of two points, where the ODE's map is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from study import data, evaluate, trajectories
from study.data import Dataset
from study.evaluate import Function
from study.factors import Sigma
from study.mixtures import GaussianMixture
from study.posterior import Posterior
from study.subjects import Mixture
from study.trajectories import grid, path, snapped

SIGMA = Sigma(min=0.002, max=80.0, data=1.0)
MEAN, STD = (0.3, -1.0), 0.5
LOW, HIGH = SIGMA.min, SIGMA.max
FEW, MANY = 64, 512  # samples


@pytest.fixture(scope="module")
def gauss() -> Dataset:
    return data.load(Mixture(means=(MEAN,), std=STD, held_out=100))


@pytest.fixture(scope="module")
def line() -> Dataset:
    return data.load(Mixture(means=((-1.0,), (1.0,)), std=0.3, samples=60, held_out=50))


def gaussian(mean: tuple[float, ...], std: float) -> GaussianMixture:
    return GaussianMixture.from_lists([list(mean)], [std], [1.0])


def exact(density: GaussianMixture) -> Function:
    """Its consistency map."""
    return lambda x, t: density.ode_map(x, t, LOW)


def asked(
    f: Function, denoisers: dict[str, Function], dataset: Dataset, steps: int = 256, **more: int
) -> dict:
    kwargs = {"sigmas": 6, "samples": MANY, "seed": 0} | more
    return trajectories.trajectories(f, denoisers, dataset, SIGMA, steps=steps, **kwargs)


def gain(std: float, t: float, r: float) -> float:
    """By how much the flow of N(m, std^2) from t to r stretches x - m."""
    return math.sqrt((std**2 + r**2) / (std**2 + t**2))


def starts(dataset: Dataset, samples: int = MANY, seed: int = 0) -> Tensor:
    z = evaluate.noise((samples, *dataset.shape), torch.device("cpu"), seed, "trajectories")
    return HIGH * z


def test_levels_are_on_the_grid_and_geometric() -> None:
    levels = grid(SIGMA, 64)
    assert len(levels) == 65 and (levels[0], levels[-1]) == (LOW, HIGH)
    roots = torch.tensor(levels).double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(64), rtol=1e-5, atol=0)
    assert grid(Sigma(rho=1.0), 64) == levels
    assert snapped([1.0, 2.0, 4.0, 8.0], [1.0, 2.9, 2.7, 8.0]) == [0, 1, 2, 3]
    assert snapped([1.0, 2.0, 4.0, 8.0], [1.0, 1.1, 8.0]) == [0, 3]


def test_an_exact_map_has_the_solvers_error_of_second_order(gauss: Dataset) -> None:
    """At sigma_max Heun's end is off the flow's by a gain, as the ODE is linear in x - m."""
    f, D = exact(gauss.density), gauss.density.denoiser
    errors = []
    for steps in (32, 64, 128, 256):
        result = asked(f, {"population": D}, gauss, steps)
        errors.append(result["value"])
        assert result["population"][0] == result["population_se"][0] == 0.0
        for name in ("population", "drift_population"):
            assert max(result[name]) <= 1.001 * result["value"]
        assert result["spread_population"] < result["value"]
    assert errors[1] / STD == pytest.approx(0.004, rel=0.2)  # as the module says
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([2.0] * 3, abs=0.1)


def test_the_path_is_the_flow_and_keeps_its_levels(gauss: Dataset) -> None:
    points = path(gauss.density.denoiser, gauss, SIGMA, 6, FEW, 1024, 3)
    levels, x = grid(SIGMA, 1024), starts(gauss, FEW, 3)
    kept = snapped(levels, trajectories.geometric(LOW, HIGH, 6))
    assert points.shape == (6, FEW, 2) and torch.equal(points[-1], x)
    for i, point in zip(kept, points, strict=True):
        expected = gauss.density.ode_map(x, HIGH, levels[i])
        torch.testing.assert_close(point, expected, rtol=1e-4, atol=1e-4)


def test_the_error_and_drift_of_another_gaussians_map(gauss: Dataset) -> None:
    """x(t) = m + g (T z - m), and f(x, t) = n + h (x - n): both are affine in z, so what is
    measured is known from the z that were drawn, and within four errors without them."""
    other_mean, other_std = (0.5, 0.1), 0.8
    f = exact(gaussian(other_mean, other_std))
    result = asked(f, {"teacher": gauss.density.denoiser}, gauss, 1024)
    m, n = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, other_mean))
    slopes, offsets = [], []  # f(x(t), t) = slope T z + offset
    for t in result["sigma"]:
        g, h = gain(STD, HIGH, t), gain(other_std, t, LOW)
        slopes.append(h * g)
        offsets.append(n + h * (m - g * m - n))
    z = starts(gauss).double()
    y = torch.stack([a * z + b for a, b in zip(slopes, offsets, strict=True)])

    def check(name: str, deviation: Tensor, slope: float, offset: Tensor, found: float) -> None:
        square = deviation.square().mean(-1)
        assert found == pytest.approx(float(square.mean().sqrt()), rel=2e-3, abs=3e-4), name
        law = math.sqrt(slope**2 * HIGH**2 + float(offset.square().mean()))
        error = float(square.std()) / math.sqrt(MANY) / 2 / max(law, 1e-9)
        assert found == pytest.approx(law, abs=4 * error + 3e-4), name

    end, end_offset = gain(STD, HIGH, LOW), (1 - gain(STD, HIGH, LOW)) * m
    for i in range(len(y)):
        check("teacher", y[i] - end * z - end_offset, slopes[i] - end, offsets[i] - end_offset,
              result["teacher"][i])  # fmt: skip
        check("drift", y[i] - y[-1], slopes[i] - slopes[-1], offsets[i] - offsets[-1],
              result["drift_teacher"][i])  # fmt: skip
    spread = (y - y.mean(0)).square().mean().sqrt()
    assert result["spread_teacher"] == pytest.approx(float(spread), rel=2e-3)
    assert result["value"] == result["teacher"][-1] and result["along"] == "teacher"
    assert result["drift_teacher"][0] == pytest.approx(result["value"], rel=1e-6)
    assert result["drift_teacher"][-1] == 0.0


def test_along_the_straight_line_the_exact_map_drifts(gauss: Dataset) -> None:
    """E |f(x + t z, t) - f(x + T z, T)|^2 per coordinate, x ~ N(m, s^2):
    s^2 (a(t) - a(T))^2 + (t a(t) - T a(T))^2
      = 2 (s^2 + e^2) (1 - (s^2 + t T) / sqrt((s^2 + t^2) (s^2 + T^2)))."""
    result = asked(exact(gauss.density), {"population": gauss.density.denoiser}, gauss)
    v = STD**2
    for t, found, error in zip(
        result["sigma"], result["straight"], result["straight_se"], strict=True
    ):
        cosine = (v + t * HIGH) / math.sqrt((v + t**2) * (v + HIGH**2))
        law = math.sqrt(2 * (v + LOW**2) * max(1 - cosine, 0))
        assert found == pytest.approx(law, abs=4 * error + 1e-5)
        assert error < 0.05 * law + 1e-9
    assert result["straight"][0] > 100 * result["drift_population"][0]  # the path is another line


def test_lines_are_of_training_data_and_the_paths_noise(line: Dataset) -> None:
    x, far = trajectories.lines(line, [0.0, HIGH], FEW, 3)
    assert torch.isin(x, line.train).all() and len(x.unique()) > 20
    torch.testing.assert_close(far - x, starts(line, FEW, 3), rtol=0, atol=1e-5)


def test_the_floor_of_two_gaussians(gauss: Dataset) -> None:
    mean, std = (0.4, -0.7), 0.6
    second = gaussian(mean, std)
    names = {"teacher": gauss.density.denoiser, "second_teacher": second.denoiser}
    result = asked(lambda x, t: x, names, gauss, 512)
    one, two = gain(STD, HIGH, LOW), gain(std, HIGH, LOW)
    offsets = [(1 - one) * a - (1 - two) * b for a, b in zip(MEAN, mean, strict=True)]
    law = math.sqrt(((one - two) * HIGH) ** 2 + sum(o**2 for o in offsets) / 2)
    assert result["floor"] == pytest.approx(law, abs=4 * result["floor_se"] + 1e-3)
    assert 0 < result["floor_se"] < 0.03 * law
    alone = asked(lambda x, t: x, {"teacher": gauss.density.denoiser}, gauss, 512)
    assert alone["floor"] is alone["floor_se"] is None


def test_the_empirical_path_ends_at_one_of_two_points() -> None:
    """D = tanh(x / t^2) for the points -1 and 1, whose flow keeps quantiles: the sign stays."""
    points = torch.tensor([[-1.0], [1.0]])
    known = data.load(Mixture(means=((-1.0,), (1.0,)), std=0.1, samples=10, held_out=10))
    dataset = Dataset(points, points, (1,), 1.0, "two", known.density)
    D = Posterior(points).denoiser
    x, t = torch.linspace(-3, 3, 13)[:, None], torch.linspace(0.2, 4, 13)
    torch.testing.assert_close(D(x, t), torch.tanh(x / t[:, None] ** 2))

    names = {"empirical": D, "population": known.density.denoiser}
    result = asked(lambda x, t: x.sign(), names, dataset, 256)
    assert max(result["empirical"]) < 2 * LOW
    assert result["spread_empirical"] == 0.0 == max(result["drift_empirical"])
    assert result["along"] == "population"  # the population's spread about its modes, 0.1
    assert result["value"] == result["population"][-1] == pytest.approx(0.1, rel=0.15)
    flow = GaussianMixture.from_lists([[-1.0], [1.0]], [1e-4] * 2, [1.0] * 2)
    assert asked(exact(flow), {"empirical": D}, dataset, 256)["value"] < 0.01
    zero = asked(lambda x, t: torch.zeros_like(x), {"empirical": D}, dataset, 256)
    assert zero["value"] == pytest.approx(1.0, abs=2 * LOW) and zero["along"] == "empirical"
    assert zero["value_se"] < LOW


def test_standard_errors_are_those_of_repeated_measurements(gauss: Dataset) -> None:
    f, names = exact(gaussian((0.5, 0.1), 0.8)), {"population": gauss.density.denoiser}
    results = [asked(f, names, gauss, 16, samples=FEW, seed=s, sigmas=3) for s in range(100)]
    for read in (
        lambda r, e: r["population" + e][-1],
        lambda r, e: r["drift_population" + e][1],
        lambda r, e: r["spread_population" + e],
        lambda r, e: r["straight" + e][1],
    ):
        values = torch.tensor([read(r, "") for r in results])
        errors = torch.tensor([read(r, "_se") for r in results])
        assert float(errors.mean() / values.std()) == pytest.approx(1.0, abs=0.3)


def test_paths_are_solved_once_for_all_snapshots_and_in_any_chunks(
    gauss: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def D(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        sizes.append(len(x))
        return gauss.density.denoiser(x, t)

    first = asked(lambda x, t: x, {"teacher": D}, gauss, 8, samples=20)
    assert sizes == [20] * 16  # twice per step
    asked(lambda x, t: 2 * x, {"teacher": D}, gauss, 8, samples=20)
    assert len(sizes) == 16
    asked(lambda x, t: x, {"teacher": D}, gauss, 8, samples=20, seed=1)
    assert len(sizes) == 32
    path.cache_clear()
    for module in (evaluate, trajectories):
        monkeypatch.setattr(module, "CHUNK", 7)
    seen = []
    again = asked(lambda x, t: seen.append(len(x)) or x, {"teacher": D}, gauss, 8, samples=20)
    assert max(sizes[32:]) == max(seen) == 7
    for key in ("teacher", "straight", "spread_teacher"):
        assert again[key] == pytest.approx(first[key], rel=1e-5, abs=1e-6)


def test_more_levels_than_steps_are_given_once_each(gauss: Dataset) -> None:
    result = asked(lambda x, t: x, {"teacher": gauss.density.denoiser}, gauss, 8, sigmas=100)
    assert result["sigma"] == grid(SIGMA, 8)
    assert len(result["teacher"]) == len(result["straight_se"]) == 9
    assert asked(lambda x, t: x, {}, gauss, 8)["value"] is None
