"""Gradient probes against students whose gradient's variance can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from study import data, factors, gradients, networks
from study.consistency import consistency
from study.data import Batch, Dataset, to_float
from study.factors import (
    L1,
    L2,
    Analytic,
    Budget,
    Continuous,
    DenoisingHead,
    EctMapping,
    Empirical,
    Factors,
    Fixed,
    FromRun,
    KSample,
    L2Norm,
    Mixture,
    Mlp,
    PosteriorK,
    PseudoHuber,
    Score,
    Sigma,
    SingleSample,
    Teacher,
    Uniform,
    UniformGrid,
    Windowed,
)
from study.gradients import gradient_cosine, gradient_noise, gradient_slopes
from study.losses import Problem
from study.models import law_of
from study.networks import dropout
from study.schedules import karras
from study.scores import Knowledge

S, N = 0.5, 8
SIGMA = Sigma(min=0.1, max=5.0, data=S)
GAUSS = Mixture(means=((0.0,),), std=S, held_out=8)
TWO_MODES = Mixture(means=((-1.0,), (1.0,)), std=0.3, held_out=8)
FEW = Mixture(means=((-1.0, 0.5), (1.0, 0.0)), std=0.3, samples=40, held_out=8)
PARTS = ("estimator", "dropout", "draw", "total", "signal")


class Affine(nn.Module):
    """F = a x + b of the scaled input, which dropout scales."""

    def __init__(self, a: float = 0.3, b: float = 0.4, drop: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value)) for value in (a, b))
        self.drop = drop

    def forward(self, x: Tensor, c_noise: Tensor, key: Tensor | None = None) -> Tensor:
        return self.a * dropout(x, self.drop, key, 0) + self.b


def problem(
    net: nn.Module, mixture: Mixture = GAUSS, score: Score = SingleSample(), **changes: object
) -> tuple[Problem, Dataset]:
    """A problem on the mixture and its data: Euler, L2, N levels of equal chance."""
    dataset = data.load(mixture)
    plain = {"distance": L2(), "discretization": Fixed(N=N), "law": UniformGrid(), "score": score}
    sigma = changes.pop("sigma", SIGMA)
    teachers = changes.pop("teachers", {})
    f = Factors(data=mixture, network=Mlp(), budget=Budget(images=1), **plain | changes)
    return Problem(f, sigma, net, Knowledge(law_of(dataset), dataset.density, teachers)), dataset


def noise(p: Problem, dataset: Dataset, levels: list[float], seed: int = 0, **changes: object) -> dict:
    settings = {"N": N, "progress": 1.0, "batches": 16, "rows": 1000, "second_moment": None}
    generator = torch.Generator().manual_seed(seed)
    return gradient_noise(p, dataset, levels=levels, generator=generator, **settings | changes)


def network(mixture: Mixture, width: int = 32, drop: float = 0.0, head: bool = False) -> nn.Module:
    """A small MLP with random weights, of its output layers too."""
    net = networks.build(Mlp(width=width, depth=1), (len(mixture.means[0]),), drop, 3, "student",
                         head=head)  # fmt: skip
    for out in [net.out] + [net.head] * head:
        nn.init.normal_(out.weight, std=width**-0.5, generator=torch.Generator().manual_seed(1))
    return net


def closed(r: float, t: float, a: float = 0.3, b: float = 0.4, s: float = S) -> dict[str, np.ndarray]:
    """Of x ~ N(0, s^2) and f = k_t x_t + o_t b, k = c_skip + c_out c_in a, o = c_out, the parts of
    the variance of g = 2 w (c_out c_in x_t, c_out) (A x_t + B + n), per parameter. A x_t + B + n is
    f(x_t, t) - f(x_r, r): given x_t, x_r has the mean m x_t, m = r / t + (1 - r / t) s^2 / (s^2 +
    t^2), and the variance (1 - r / t)^2 s^2 t^2 / (s^2 + t^2), n's but for the factor k_r^2."""

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
    return {"estimator": estimator, "draw": draw, "mean": mean, "step": step}


def by_law(pairs: list[tuple[float, float]]) -> dict[str, np.ndarray]:
    """The parts when every pair is as likely: the means' variance over t belongs to the draw."""
    parts = [closed(r, t) for r, t in pairs]
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
    adam = 1 / (np.array([2.0, 0.1]) + p.factors.optimizer.eps) ** 2
    result = noise(p, dataset, [0.4, 1.5, 5.0], rows=4000, second_moment=v)
    assert len(result["sigma"]) == 3 and result["N"] == N
    expected = [closed(at["r"], at["sigma"]) for at in levels_of(result)] + [by_law(grid_pairs())]
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
    """Same bits given x_t: the estimator's part is 0, the draw's and the signal are those of CT."""
    p, dataset = problem(Affine(), score=Analytic())
    result = noise(p, dataset, [0.4, 1.5, 5.0], rows=4000)
    for at in [*levels_of(result), result["law"]]:
        assert at["estimator"] == at["estimator_se"] == at["rho"] == at["rho_se"] == 0
    for at in levels_of(result):
        truth = closed(at["r"], at["sigma"])
        agree(at, "draw", truth["draw"].sum(), least=0.5)
        agree(at, "signal", (truth["mean"] ** 2).sum())


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
    p = replace(p, factors=msgspec.structs.replace(p.factors, score=SingleSample()))
    assert min(noise(p, dataset, [0.5, 5.0], rows=50, batches=4)["rho"]) > 0.001


@pytest.mark.parametrize("score", [SingleSample(), PosteriorK(k=3), KSample(n=4)], ids=str)
def test_below_t_star_the_posterior_is_a_point(score: Score) -> None:
    sigma = Sigma(min=1e-4, max=5.0, data=1.0)
    p, dataset = problem(network(FEW), FEW, score, sigma=sigma, distance=PseudoHuber())
    result = noise(p, dataset, [1e-4, 5.0], rows=50)
    assert result["sigma"][0] < 1e-3  # 40 points in the plane lie further apart
    assert result["estimator"][0] == result["rho"][0] == 0 and result["total"][0] > 0
    assert result["rho"][1] > 0.01
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
    """Half of the rows pass, doubled, and b = 0: given x_t, the gradient of a is h or 0 with equal
    chance. Its variance is half of h's own, the estimator's, and the mask's (E h)^2 / 4."""
    net = Affine(b=0.0, drop=0.5)
    net.b.requires_grad_(False)
    p, dataset = problem(net, dropout=0.5)
    free = closed(1.0, 2.0, a=0.6, b=0.0)  # pair by pair below: one mask scales student and target
    assert free["estimator"][0] > 0
    net.b.requires_grad_(True)
    result = noise(p, dataset, [1.5, 5.0], rows=4000)
    for at in levels_of(result):
        on, off = closed(at["r"], at["sigma"], 0.6, 0.0), closed(at["r"], at["sigma"], 0.0, 0.0)
        # of a: doubled where the mask lets x pass, nothing where it does not; of b: always
        a_square = (on["draw"] + on["mean"] ** 2)[0] * 4
        b_on, b_off = (np.sqrt(part["draw"][1]) for part in (on, off))
        agree(at, "estimator", 2 * on["estimator"][0] + (on["estimator"] + off["estimator"])[1] / 2)
        sign = math.copysign(1, on["mean"][0] * off["mean"][0])  # of A in the two cases
        agree(at, "dropout", a_square / 4 + (b_on - sign * b_off) ** 2 / 4, least=0.5)
        assert at["draw"] == pytest.approx(at["total"] - at["dropout"] - at["estimator"])
    exact = replace(p, factors=msgspec.structs.replace(p.factors, score=Analytic()))
    assert noise(exact, dataset, [1.5], rows=50)["estimator"] == [0.0]
    assert noise(exact, dataset, [1.5], rows=50)["dropout"][0] > 0


def test_the_probe_is_unbiased_and_its_jackknife_calibrated() -> None:
    """Many small probes: their mean is the truth, their spread what one of them claims."""
    p, dataset = problem(Affine())
    settings = {"batches": 8, "rows": 16}
    found = [noise(p, dataset, [1.5], seed=seed, **settings) for seed in range(250)]
    truth = closed(found[0]["r"][0], found[0]["sigma"][0])
    expected = {"estimator": truth["estimator"].sum(), "draw": truth["draw"].sum(),
                "signal": (truth["mean"] ** 2).sum(), "step": None}  # fmt: skip
    expected["total"] = expected["estimator"] + expected["draw"]
    for name, value in expected.items():
        values = np.array([result[name][0] for result in found])
        errors = np.array([result[f"{name}_se"][0] for result in found])
        if value is not None:
            assert abs(values.mean() - value) < 4 * values.std(ddof=1) / math.sqrt(len(values)), name
        assert 0.77 < errors.mean() / values.std(ddof=1) < 1.3, name


def test_pairs_are_those_of_training() -> None:
    p, dataset = problem(Affine())
    pairs = grid_pairs()
    asked = [0.01, pairs[2][1] * 1.05, pairs[2][1] * 0.95, 99.0]
    assert gradients._pairs(p, N, asked) == [pairs[0], pairs[2], pairs[-1]]
    p, _ = problem(Affine(), discretization=EctMapping(q=4.0, k=0.0))
    (r, t), *_ = gradients._pairs(p, 4.0, [2.0])
    assert (r, t) == pytest.approx((1.5, 2.0))  # t (1 - 1 / q)
    p, _ = problem(network(GAUSS), objective=Continuous())
    result = noise(p, dataset, [0.3, 2.0], rows=20, batches=4)
    assert result["r"] == result["sigma"] == pytest.approx([0.3, 2.0])
    assert result["step"] == [None, None] and result["law"]["step_over_c_se"] is None


def test_nothing_to_divide_by_is_none() -> None:
    """Both levels at once at sigma_min: f is the identity, whatever the weights."""
    p, dataset = problem(network(GAUSS), objective=Continuous(), sigma=Sigma(min=2.0, max=2.5, data=S))
    p, dataset = problem(Affine(), weighting=Uniform(), discretization=Fixed(N=2))
    p.net.a.data.zero_()
    p.net.b.data.zero_()
    frozen = [w.requires_grad_(False) for w in (p.net.a,)]
    assert frozen
