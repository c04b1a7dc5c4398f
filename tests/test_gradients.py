"""Gradient probes against students whose gradient's variance can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from study import data, factors, networks, replicates
from study.data import Batch, Dataset
from study.factors import (
    L1,
    L2,
    Adam,
    Analytic,
    Budget,
    Continuous,
    DenoisingHead,
    EctMapping,
    Empirical,
    Factors,
    Fixed,
    FromRun,
    L2Norm,
    PosteriorK,
    PseudoHuber,
    Score,
    Sigma,
    SingleSample,
    Teacher,
    UniformGrid,
    Windowed,
)
from study.gradients import Probe, gradient_cosine, gradient_noise, gradient_slopes
from study.losses import Problem
from study.networks import dropout
from study.posterior import law_of
from study.schedules import karras
from study.scores import Knowledge
from study.subjects import Mixture, Mlp

S, N, CT = 0.5, 8, SingleSample()
SIGMA = Sigma(min=0.1, max=5.0, data=S)
GAUSS = Mixture(means=((0.0,),), std=S, held_out=8)
TWO_MODES = Mixture(means=((-1.0,), (1.0,)), std=0.3, held_out=8)
FEW = Mixture(means=((-1.0, 0.5), (1.0, 0.0)), std=0.3, samples=40, held_out=8)


class Affine(nn.Module):
    """F = a x + b of the scaled input, which dropout scales."""

    def __init__(self, a: float = 0.3, b: float = 0.4, drop: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value)) for value in (a, b))
        self.drop = drop

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        return self.a * dropout(x, self.drop, key, 0) + self.b


class Idle(Affine):
    """A network that reads none of its weights."""

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        return x + 0 * self.b


def problem(
    net: nn.Module, mixture: Mixture = GAUSS, score: Score = CT, **changes: object
) -> tuple[Problem, Dataset]:
    """A problem on the mixture and its data: Euler, L2, N levels of equal chance."""
    dataset = data.load(mixture)
    plain = {"distance": L2(), "discretization": Fixed(N=N), "law": UniformGrid(), "score": score}
    sigma = changes.pop("sigma", SIGMA)
    teachers = changes.pop("teachers", {})
    f = Factors(data=mixture, network=Mlp(), budget=Budget(images=1), **plain | changes)
    return Problem(f, sigma, net, Knowledge(law_of(dataset), dataset.density, teachers)), dataset


def changed(p: Problem, **changes: object) -> Problem:
    """The problem with other factors."""
    return replace(p, factors=msgspec.structs.replace(p.factors, **changes))


def probe(p: Problem, dataset: Dataset, seed: int = 0, **changes: object) -> Probe:
    settings = {"N": N, "progress": 1.0, "batches": 16, "rows": 1000}
    generator = torch.Generator().manual_seed(seed)
    return Probe(p, dataset, generator=generator, **settings | changes)


def noise(
    p: Problem,
    dataset: Dataset,
    levels: list[float],
    seed: int = 0,
    second_moment: dict[str, Tensor] | None = None,
    **changes: object,
) -> dict:
    return gradient_noise(probe(p, dataset, seed, **changes), levels, second_moment)


def network(mixture: Mixture, width: int = 32, drop: float = 0.0, head: bool = False) -> nn.Module:
    """A small MLP with random weights, of its output layers too."""
    net = networks.build(Mlp(width=width, depth=1), (len(mixture.means[0]),), drop, 3, "student",
                         head=head)  # fmt: skip
    for out in [net.out] + [net.head] * head:
        nn.init.normal_(out.weight, std=width**-0.5, generator=torch.Generator().manual_seed(1))
    return net


def closed(
    r: float, t: float, a: float = 0.3, b: float = 0.4, s: float = S
) -> dict[str, np.ndarray]:
    """Of x ~ N(0, s^2) and f = k_t x_t + o_t b, k = c_skip + c_out c_in a, o = c_out, the parts of
    the variance of g = 2 w (c_out c_in x_t, c_out) (A x_t + B + e), per parameter. A x_t + B + e =
    f(x_t, t) - f(x_r, r): given x_t, x_r has the mean m x_t, m = r / t + (1 - r / t) s^2 / (s^2 +
    t^2), and the variance (1 - r / t)^2 s^2 t^2 / (s^2 + t^2), which gives e's, n, by k_r^2."""

    def at(level: float) -> tuple[float, float, float]:
        above, c_in = level - SIGMA.min, 1 / math.hypot(level, S)
        out = S * above * c_in
        return S * S / (above**2 + S * S) + out * c_in * a, out, c_in

    (k_t, o_t, c_in), (k_r, o_r, _) = at(t), at(r)
    V = s * s + t * t
    m = r / t + (1 - r / t) * s * s / V
    n = (k_r * (1 - r / t)) ** 2 * s * s * t * t / V
    A, B, w = k_t - k_r * m, (o_t - o_r) * b, 2 / (t - r)
    slope = np.array([w * o_t * c_in, w * o_t])
    mean = slope * np.array([A * V, B])
    draw = slope**2 * np.array([2 * A * A * V * V + B * B * V, A * A * V])
    estimator = slope**2 * np.array([V, 1.0]) * n
    step = math.sqrt(A * A * V + B * B + n)
    rest = {"step": step, "n": n, "k_r": k_r, "slope": slope}
    return {"estimator": estimator, "draw": draw, "mean": mean, **rest}


def by_law() -> dict[str, np.ndarray]:
    """The parts when every pair is as likely: the means' variance over t belongs to the draw."""
    parts = [closed(r, t) for r, t in grid_pairs()]
    mean = np.mean([p["mean"] for p in parts], 0)
    return {
        "estimator": np.mean([p["estimator"] for p in parts], 0),
        "draw": np.mean([p["draw"] for p in parts], 0) + np.var([p["mean"] for p in parts], 0),
        "mean": mean,
        "step": math.sqrt(np.mean([p["step"] ** 2 for p in parts])),
    }


def agree(found: dict, name: str, expected: float, errors: float = 4, least: float = 0.2) -> None:
    """Within so many standard errors, which mean something."""
    value, error = found[name], found[f"{name}_se"]
    assert abs(value - expected) <= errors * error + 1e-6 * abs(expected), (name, value, expected)
    assert error <= least * abs(expected), (name, value, error)


def grid_pairs() -> list[tuple[float, float]]:
    levels = karras(torch.arange(N), N, SIGMA).float().tolist()
    return list(zip(levels, levels[1:], strict=False))


def levels_of(result: dict) -> list[dict]:
    """The result as one dict per level."""
    lists = {k: v for k, v in result.items() if isinstance(v, list)}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


# --- noise ---


def test_parts_of_a_gaussians_variance_in_closed_form() -> None:
    """Per level and under the law, raw and divided by Adam's second moment."""
    p, dataset = problem(Affine())
    v = {"a": torch.tensor(4.0), "b": torch.tensor(0.01)}
    adam = 1 / np.array([2.0, 0.1]) ** 2
    result = noise(p, dataset, [0.4, 1.5, 5.0], batches=100, second_moment=v)
    assert len(result["sigma"]) == 3 and result["N"] == N
    expected = [closed(at["r"], at["sigma"]) for at in levels_of(result)] + [by_law()]
    for at, truth in zip([*levels_of(result), result["law"]], expected, strict=True):
        total = truth["estimator"] + truth["draw"]
        agree(at, "estimator", truth["estimator"].sum())
        agree(at, "total", total.sum(), least=0.5)
        agree(at, "rho", truth["estimator"].sum() / total.sum(), least=0.5)
        weighted = (adam * truth["estimator"]).sum() / (adam * total).sum()
        agree(at, "rho_adam", weighted, least=0.5)
        agree(at, "signal", (truth["mean"] ** 2).sum())
        agree(at, "snr", (truth["mean"] ** 2).sum() / total.sum(), least=0.5)
        agree(at, "step", truth["step"])
        assert at["dropout"] == at["dropout_se"] == 0
        assert at["draw"] == pytest.approx(at["total"] - at["estimator"])
        assert at["step_over_c"] is None
        assert abs(weighted - truth["estimator"].sum() / total.sum()) > 0.01
    assert result["value"] == result["law"]["rho"]


def test_a_score_of_x_t_alone_has_no_noise_to_the_last_bit() -> None:
    """The estimator's part is 0 for CD; the draw's and the signal are those of CT."""
    p, dataset = problem(Affine(), score=Analytic())
    result = noise(p, dataset, [0.4, 1.5, 5.0], batches=100)
    for at in [*levels_of(result), result["law"]]:
        assert at["estimator"] == at["estimator_se"] == at["rho"] == at["rho_se"] == 0
    for at in levels_of(result):
        truth = closed(at["r"], at["sigma"])
        agree(at, "draw", truth["draw"].sum(), least=0.5)
        agree(at, "signal", (truth["mean"] ** 2).sum())


def test_adam_divides_by_the_root_of_v_and_eps() -> None:
    """sqrt(4) + 1 and sqrt(1) + 1 are 3 and 2, as are sqrt(9) and sqrt(4)."""
    p, dataset = problem(Affine())
    values = []
    for eps, a, b in ((1.0, 4.0, 1.0), (1e-12, 9.0, 4.0), (1e-12, 1.0, 1.0)):
        adam = changed(p, optimizer=Adam(eps=eps))
        v = {"b": torch.tensor(b), "a": torch.tensor(a)}
        values.append(noise(adam, dataset, [1.5], rows=50, second_moment=v)["rho_adam"][0])
    assert values[0] == pytest.approx(values[1], rel=1e-9) != pytest.approx(values[2], rel=1e-3)


@pytest.mark.parametrize("changes", [{"score": PosteriorK(k=4)}, {"repeat": 4}], ids=str)
def test_four_draws_of_x_have_a_quarter_of_the_noise(changes: dict) -> None:
    """All of them are drawn again, x and those that the score or the loss draws itself."""
    p, dataset = problem(Affine(), **changes)
    (at,) = levels_of(noise(p, dataset, [1.5], batches=100))
    truth = closed(at["r"], at["sigma"])
    agree(at, "estimator", truth["estimator"].sum() / 4)
    agree(at, "draw", truth["draw"].sum(), least=0.5)


@pytest.mark.parametrize("objective", [factors.Consistency(), Continuous()], ids=str)
@pytest.mark.parametrize("distance", [L2(), PseudoHuber(), L1()], ids=str)
def test_networks_have_no_noise_under_a_teacher_either(
    objective: factors.Objective, distance: factors.Distance
) -> None:
    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / (1 + t[:, None] ** 2)

    p, dataset = problem(network(FEW), FEW, Teacher(run="edm"), teachers={"edm": teacher},
                         objective=objective, distance=distance)  # fmt: skip
    result = noise(p, dataset, [0.5, 5.0], rows=50, batches=4)
    assert result["rho"] == [0.0, 0.0] and result["law"]["estimator"] == 0
    assert min(result["total"]) > 0
    p = changed(p, score=SingleSample())
    assert min(noise(p, dataset, [0.5, 5.0], rows=50, batches=4)["rho"]) > 0.001


@pytest.mark.parametrize("score", [CT, PosteriorK(k=3)], ids=str)
def test_below_t_star_the_posterior_is_a_point(score: Score) -> None:
    sigma = Sigma(min=1e-4, max=5.0, data=1.0)
    p, dataset = problem(network(FEW), FEW, score, sigma=sigma, distance=PseudoHuber())
    result = noise(p, dataset, [1e-4, 5.0], N=40, rows=50)
    assert result["sigma"][0] < 1e-3  # 40 points in the plane lie further apart
    assert result["estimator"][0] == result["rho"][0] == 0 and result["total"][0] > 0
    assert result["rho"][1] > 0.002
    assert result["step_over_c"] == pytest.approx(
        [s / (0.00054 * math.sqrt(2)) for s in result["step"]]
    )


def test_a_window_has_noise_where_its_score_has() -> None:
    score = Windowed(inside=Analytic(), outside=SingleSample(), t_low=0.2, t_high=1.0)
    p, dataset = problem(Affine(), score=score)
    result = noise(p, dataset, [0.5, 5.0], rows=50)
    assert result["estimator"][0] == 0 < result["estimator"][1]
    assert 0 < result["law"]["rho"] < 1


def test_a_label_that_is_x_is_noise_under_any_score() -> None:
    net = network(FEW, head=True)
    p, dataset = problem(net, FEW, Empirical(), auxiliary=DenoisingHead())
    assert min(noise(p, dataset, [0.5, 5.0], rows=50)["rho"]) > 0.001
    p, _ = problem(net, FEW, Empirical(), teachers={"edm": lambda x_t, t: 0 * x_t},
                   auxiliary=DenoisingHead(labels=FromRun(run="edm")))  # fmt: skip
    assert noise(p, dataset, [0.5, 5.0], rows=50)["rho"] == [0.0, 0.0]


def test_dropout_is_a_part_of_its_own() -> None:
    """A row passes, doubled, with chance 1/2. Given x_t, E g is then one or the other of two, and
    the mask's part is a quarter of their squared distance; the estimator's is a mean over both."""
    p, dataset = problem(Affine(b=0.0, drop=0.5), dropout=0.5)
    result = noise(p, dataset, [1.5, 5.0], batches=100)
    for at in levels_of(result):
        on, off = (closed(at["r"], at["sigma"], a, 0.0) for a in (0.6, 0.0))
        estimator = (4 * on["estimator"][0] + on["estimator"][1] + off["estimator"][1]) / 2
        agree(at, "estimator", estimator)
        # E g is slope (2 A x_t^2, A x_t) or slope (0, A' x_t); draw[1] is the mean square of A x_t
        sign = math.copysign(1, on["mean"][0] * off["mean"][0])
        apart = on["draw"][1] ** 0.5 - sign * off["draw"][1] ** 0.5
        agree(at, "dropout", (4 * (on["draw"] + on["mean"] ** 2)[0] + apart**2) / 4, least=0.5)
        assert at["draw"] == pytest.approx(at["total"] - at["dropout"] - at["estimator"])
    exact = changed(p, score=Analytic())
    assert noise(exact, dataset, [1.5])["estimator"] == [0.0]  # the same mask for both of a pair
    assert noise(exact, dataset, [1.5])["dropout"][0] > 0


def test_another_mask_leaves_the_estimators_part_as_it_is() -> None:
    """Networks that differ in nothing but a dropout that never drops."""
    p, dataset = problem(Affine())
    never = changed(p, dropout=1e-9)
    one, other = (noise(q, dataset, [1.5], batches=100, seed=i) for i, q in enumerate((p, never)))
    assert other["dropout"] == [0.0]
    both = math.hypot(one["estimator_se"][0], other["estimator_se"][0])
    assert abs(one["estimator"][0] - other["estimator"][0]) < 4 * both


def test_the_probe_is_unbiased_and_its_jackknife_calibrated() -> None:
    """Many small probes: their mean is the truth, their spread what one of them claims."""
    p, dataset = problem(Affine())
    found = [noise(p, dataset, [1.5], seed, batches=16, rows=32) for seed in range(100)]
    (pair,) = probe(p, dataset).pairs([1.5])
    cases = (
        (closed(*pair), [levels_of(f)[0] for f in found]),
        (by_law(), [f["law"] for f in found]),
    )
    for truth, results in cases:
        expected = {k: truth[k].sum() for k in ("estimator", "draw")}
        expected["total"] = sum(expected.values())
        expected["signal"] = (truth["mean"] ** 2).sum()
        for name in (*expected, "rho", "snr", "step"):
            values = np.array([at[name] for at in results])
            spread, errors = values.std(ddof=1), np.array([at[f"{name}_se"] for at in results])
            if name in expected:
                assert abs(values.mean() - expected[name]) < 4 * spread / 10, name
            assert 0.77 < np.sqrt((errors**2).mean()) / spread < 1.3, name


def test_pairs_are_those_of_training() -> None:
    p, dataset = problem(Affine())
    pairs = grid_pairs()
    asked = [0.01, pairs[2][1] * 1.05, pairs[2][1] * 0.95, 99.0]
    assert probe(p, dataset).pairs(asked) == [pairs[0], pairs[2], pairs[-1]]
    p, _ = problem(Affine(), discretization=EctMapping(q=4.0, k=0.0))
    (r, t), *_ = probe(p, dataset, N=4.0).pairs([2.0])
    assert (r, t) == pytest.approx((1.5, 2.0))  # t (1 - 1 / q)
    p, _ = problem(network(GAUSS), objective=Continuous())
    result = noise(p, dataset, [0.3, 2.0], rows=20, batches=4)
    assert result["r"] == result["sigma"] == pytest.approx([0.3, 2.0])
    assert result["step"] == [None, None] and result["law"]["step_over_c_se"] is None


def test_a_ratio_to_nothing_is_none() -> None:
    p, dataset = problem(Idle())
    result = noise(p, dataset, [1.5], rows=20, batches=4)
    assert result["total"] == result["estimator"] == result["signal"] == [0.0]
    assert result["rho"] == result["rho_se"] == result["snr"] == [None]
    assert result["value"] is None and result["step"][0] > 0


# --- cosine ---


def cosine(
    p: Problem, dataset: Dataset, *scores: Score, levels: Sequence[float] = (1.5,), **changes: int
) -> dict:
    return gradient_cosine(probe(p, dataset, **changes), *scores, levels)


def test_cosine_of_two_scores_in_closed_form() -> None:
    """A teacher that is off by q moves B by -k_r (1 - r / t) q."""
    q = 1.5
    known = {"edm": lambda x_t, t: x_t * S * S / (S * S + t[:, None] ** 2) + q}
    p, dataset = problem(Affine(), teachers=known)
    result = cosine(p, dataset, SingleSample(), Teacher(run="edm"), batches=64)
    r, t = result["r"][0], result["sigma"][0]
    own = closed(r, t)
    other = own["mean"] - np.array([0, own["slope"][1] * own["k_r"] * (1 - r / t) * q])
    lengths = np.linalg.norm(own["mean"]) * np.linalg.norm(other)
    expected = own["mean"] @ other / lengths
    assert expected < 0.9
    (at,) = levels_of(result)
    assert abs(at["cosine"] - expected) < 4 * at["cosine_se"] < 0.1
    agree(at, "snr_score", (own["mean"] ** 2).sum() / (own["estimator"] + own["draw"]).sum())
    assert result["value"] == result["law"]["cosine"]


@dataclass(frozen=True)
class Noisy(Problem):
    """Gradients of known mean under heavy noise, most of it common to both scores."""

    def at_levels(
        self, batch: Batch, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        first = isinstance(self.factors.score, SingleSample)
        mean = torch.zeros(DIRECTIONS)
        mean[0], mean[1] = (1.0, 0.0) if first else (COSINE, math.sqrt(1 - COSINE**2))
        rows = mean + SPREAD * (batch.z + 0.2 * batch.z.roll(1 if first else 2, 1))
        return rows @ self.net.weight[0], []


DIRECTIONS, COSINE, SPREAD = 10_000, 0.9, 0.16


def test_cosine_under_heavy_noise_where_the_naive_ones_are_far_off() -> None:
    """Of mean gradients in which noise is four times the signal: in common, or one another's."""
    x = torch.zeros(2, DIRECTIONS)
    dataset = Dataset(x, x, (DIRECTIONS,), 1.0, "")
    p, _ = problem(nn.Linear(DIRECTIONS, 1, bias=False))
    p = Noisy(p.factors, p.sigma, p.net, p.known)
    result = cosine(p, dataset, SingleSample(), Analytic(), batches=16, rows=4, levels=[])
    assert result["cosine"] == result["sigma"] == []
    assert abs(result["value"] - COSINE) < 4 * result["law"]["cosine_se"] < 0.2

    own = probe(p, dataset, seed=1, rows=4)
    drawn, sides = list(own.drawn()), [own, own.under(score=Analytic())]
    a, b = (torch.stack([side.gradient(batch, (batch.u, batch.u))[0] for batch in drawn])
            for side in sides)  # fmt: skip
    same = torch.cosine_similarity(a.mean(0), b.mean(0), dim=0)
    apart = torch.cosine_similarity(a[:8].mean(0), b[8:].mean(0), dim=0)
    assert same > 0.94 and apart < 0.3
    snr = 1 / (DIRECTIONS * SPREAD**2 * 1.04)
    assert result["law"]["snr_score"] == pytest.approx(snr, rel=0.2)


def test_cosine_of_a_score_with_itself_and_of_nothing() -> None:
    p, dataset = problem(Affine())
    assert cosine(p, dataset, Analytic(), Analytic())["cosine"] == pytest.approx([1.0])
    p, dataset = problem(Idle())
    result = cosine(p, dataset, CT, Analytic(), batches=4, rows=20)
    assert result["cosine"] == result["cosine_se"] == result["snr_against"] == [None]


# --- slopes ---

FINE = Sigma(min=0.05, max=3.0, data=1.0)


def slopes(
    p: Problem, dataset: Dataset, Ns: tuple[int, ...] = (10, 20, 40), **changes: object
) -> dict:
    own = probe(p, dataset, **{"rows": 4000} | changes)
    return gradient_slopes(own, SingleSample(), Analytic(), Ns)


def test_under_l2_the_gradients_meet_like_one_over_N_and_the_losses_never() -> None:
    p, dataset = problem(network(TWO_MODES, 16), TWO_MODES, sigma=FINE)
    result = slopes(p, dataset, rows=8000)
    assert abs(result["slope_gradient"] + 1) < 4 * result["slope_gradient_se"] < 1.2
    assert result["slope_gradient"] < -0.5 and result["value"] == result["slope_gradient"]
    assert abs(result["slope_loss"]) < 0.1 and min(result["loss_ratio"]) > 0.5
    assert (result["predicted_loss"], result["predicted_gradient"]) == (0.0, -1.0)
    for name in ("loss_score", "loss_against"):  # w d, 1 / (t - r) times O(N^-2)
        assert result[name][2] / result[name][1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("distance", [L2Norm(), L1()], ids=str)
def test_under_a_norm_neither_meets(distance: factors.Distance) -> None:
    p, dataset = problem(network(FEW), FEW, sigma=FINE, distance=distance)
    p = replace(p, known=replace(p.known, density=p.known.law))
    result = slopes(p, dataset, (20, 40, 80), rows=500)
    assert abs(result["slope_gradient"]) < 0.2 > 4 * result["slope_gradient_se"]
    assert abs(result["slope_loss"]) < 0.1 and min(result["gradient_difference"]) > 0.1
    assert (result["predicted_loss"], result["predicted_gradient"]) == (0.0, 0.0)


def test_losses_and_differences_on_a_gaussian_in_closed_form() -> None:
    """Of affine f on a Gaussian the gradients are one, and the losses differ by the noise."""
    p, dataset = problem(Affine(), distance=L2())
    result = slopes(p, dataset, (8, 16))
    pairs = grid_pairs()
    parts = [closed(r, t) for r, t in pairs]
    noise = [part["n"] / (t - r) for part, (r, t) in zip(parts, pairs, strict=True)]
    whole = [part["step"] ** 2 / (t - r) for part, (r, t) in zip(parts, pairs, strict=True)]
    first = {k: v[0] for k, v in result.items() if isinstance(v, list)}
    agree(first, "loss_score", np.mean(whole))
    agree(first, "loss_against", np.mean(whole) - np.mean(noise))
    agree(first, "loss_ratio", np.mean(noise) / (np.mean(whole) - np.mean(noise)))
    assert abs(first["squared_difference"]) < 4 * first["squared_difference_se"]


def test_a_power_is_fitted_to_values_that_noise_makes_negative() -> None:
    Ns, generator = (10, 20, 40, 80), np.random.default_rng(0)
    truth, errors = 3 * np.array(Ns) ** -2.0, [1e-3] * 4
    assert replicates.power(Ns, list(truth), errors) == pytest.approx(-2, abs=1e-4)
    noisy = [truth + 1e-3 * generator.standard_normal(4) for _ in range(400)]
    assert min(map(min, noisy)) < 0
    assert np.median([replicates.power(Ns, list(y), errors) for y in noisy]) == pytest.approx(
        -2, abs=0.02
    )
    assert replicates.power(Ns, [1.0, None, 1.0, 1.0], errors) is None
    assert replicates.power(Ns, [-1.0] * 4, errors) is None
    assert replicates.power(Ns, [1.0, 0.0, 0.0, 0.0], errors) is None
