"""What half precision does to the gradient, against arithmetic that is rounded by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from studies import TWO_MODES, read, replaced
from torch import Tensor, nn

from study import data, instruments, worker
from study.data import Batch, Dataset
from study.errors import StudyError
from study.factors import (
    L2,
    Budget,
    Continuous,
    DenoisingHead,
    Ema,
    Factors,
    Fixed,
    Own,
    PseudoHuber,
    Sigma,
    UniformGrid,
)
from study.gradients import Probe
from study.losses import Problem
from study.models import head_denoiser, in_float32
from study.networks import Network, build
from study.posterior import law_of
from study.rounding import gradient_rounding
from study.scores import Knowledge
from study.store import Store
from study.subjects import Digits, Mixture, Mlp, Unet

S, N, D = 0.5, 8, 3
SIGMA = Sigma(min=0.1, max=5.0, data=S)
VECTORS = Mixture(means=((-1.0, 0.5, 0.0), (1.0, 0.0, 0.5)), std=0.3, samples=40, held_out=8)


class Line(Network):
    """F = W x: one product, and nothing that autocast treats by rules of its own."""

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        self.out, self.head = nn.Linear(D, D, bias=False), None
        nn.init.normal_(self.out.weight, generator=torch.Generator().manual_seed(0))

    def trunk(self, x: Tensor, c_noise: Tensor, key: Tensor | None, fused: bool = False) -> Tensor:
        return x


def problem(net: nn.Module, **changes: object) -> tuple[Problem, Dataset]:
    """CT on vectors under L2, at N levels of equal chance."""
    dataset = data.load(VECTORS)
    plain = {"distance": L2(), "discretization": Fixed(N=N), "law": UniformGrid()}
    f = Factors(data=VECTORS, network=Mlp(), budget=Budget(images=1), **plain | changes)
    return Problem(f, SIGMA, net, Knowledge(law_of(dataset), dataset.density)), dataset


def probe(p: Problem, dataset: Dataset, seed: int = 0, **changes: int) -> Probe:
    settings = {"N": N, "progress": 1.0, "rows": 32, "batches": 6}
    return Probe(p, dataset, generator=torch.Generator().manual_seed(seed), **settings | changes)


def rounding(
    p: Problem, exact: Problem, dataset: Dataset, levels: Sequence[float] = (1.5,), **changes: int
) -> dict:
    return gradient_rounding(probe(p, dataset, **changes), exact, levels)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, of float32's bits the upper sixteen."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def float16(x: np.ndarray) -> np.ndarray:
    """Numpy's own, of a number that is far from its limits after all."""
    return (x * 2.0**8).astype(np.float16).astype(np.float64) / 2.0**8


ROUNDED = {"bfloat16": bfloat16, "float16": float16}
UNIT = {"bfloat16": 2.0**-9, "float16": 2.0**-12}  # the largest relative error of a rounding


def by_hand(
    W: np.ndarray, batch: Batch, r: float, t: float, rounded: Callable = np.asarray
) -> tuple:
    """The gradient (D, D) of mean_B |f(x_t, t) - f^-(x_r, r)|^2 / (D (t - r)) in W, and the steps
    (B, D); rounded: F and its gradient are products of rounded factors, rounded."""
    x, z = (v.numpy().astype(np.float64) for v in (batch.x, batch.z))

    def f(level: float) -> tuple[np.ndarray, np.ndarray, float]:
        above, c_in = level - SIGMA.min, 1 / math.hypot(level, S)
        y, c_out = x + level * z, S * above * c_in
        F = rounded(rounded(c_in * y) @ rounded(W).T)
        return S * S / (above**2 + S * S) * y + c_out * F, c_in * y, c_out

    student, scaled, c_out = f(t)
    step = student - f(r)[0]
    up = rounded(2 * c_out * step / (len(x) * D * (t - r)))  # dloss / dF
    return rounded(up.T @ rounded(scaled)), step


@pytest.mark.parametrize("precision", ROUNDED)
def test_errors_are_those_of_products_rounded_by_hand(precision: str) -> None:
    net = Line(precision)
    p, dataset = problem(net, precision=precision)
    result = rounding(p, in_float32(p), dataset)
    r, t = result["r"][0], result["sigma"][0]
    drawn = probe(p, dataset).drawn()
    W = net.out.weight.detach().numpy().astype(np.float64)
    halves = ROUNDED[precision], np.asarray
    both = [[by_hand(W, batch, r, t, rounded) for rounded in halves] for batch in drawn]
    g, h = (np.stack([pair[i][0].ravel() for pair in both]) for i in (0, 1))
    d = g - h

    def independent(a: np.ndarray, b: np.ndarray) -> float:
        """<E a, E b> by the sum over all pairs less that over equal ones."""
        return float(a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1))

    off = np.mean([np.square(half[1] - full[1]).sum(1).mean() for half, full in both])
    far = np.mean([np.square(full[1]).sum(1).mean() for _, full in both])
    expected = {
        "squared_bias": independent(d, d) / independent(h, h),
        "error": math.sqrt((d**2).sum() / (h**2).sum()),
        "error_over_noise": math.sqrt((d**2).sum() / 6 / h.var(0, ddof=1).sum()),
        "cosine_batch": float((g * h).sum() / math.sqrt((g**2).sum() * (h**2).sum())),
        "cosine": independent(g, h) / math.sqrt(independent(g, g) * independent(h, h)),
        "residual_error": math.sqrt(off / far),
    }
    unit = UNIT[precision]
    assert unit / 2 < expected["error"] < 5 * unit
    assert unit < expected["residual_error"] < 50 * unit
    for name, value in expected.items():
        assert result[name][0] == pytest.approx(value, rel=1e-2), name
    assert 1 - result["cosine_batch"][0] == pytest.approx(1 - expected["cosine_batch"], rel=1e-2)
    # few batches of few rows: of a square that noise makes negative there is no root
    assert expected["squared_bias"] < 0 and result["bias"] == result["bias_se"] == [None]
    assert result["step_over_c"] == [None] and result["value"] == result["law"]["error"]


def test_the_smaller_the_step_the_more_of_it_is_rounding() -> None:
    p, dataset = problem(Line("bfloat16"), precision="bfloat16", distance=PseudoHuber(c0=0.03))
    few, many = (rounding(p, in_float32(p), dataset, N=n) for n in (8, 128))
    assert many["residual_error"][0] > 8 * few["residual_error"][0]
    W = p.net.out.weight.detach().numpy().astype(np.float64)
    drawn = probe(p, dataset).drawn()
    far = [by_hand(W, batch, few["r"][0], few["sigma"][0])[1] for batch in drawn]
    rms = math.sqrt(np.square(far).sum(-1).mean())
    assert few["step_over_c"][0] == pytest.approx(rms / (0.03 * math.sqrt(D)), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"objective": Continuous()}], ids=str)
def test_float32_beside_float32_is_no_error_at_all(changes: dict) -> None:
    net = build(Mlp(width=16, depth=1), (D,), 0.0, 0, "student")
    nn.init.normal_(net.out.weight, generator=torch.Generator().manual_seed(1))
    p, dataset = problem(net, **changes)
    result = rounding(p, in_float32(p), dataset)
    for at in ({k: v[0] for k, v in result.items() if isinstance(v, list)}, result["law"]):
        for name in ("bias", "squared_bias", "error", "error_over_noise"):
            assert at[name] == at[f"{name}_se"] == 0, name
        assert at["cosine"] == at["cosine_batch"] == pytest.approx(1, abs=1e-12)
        assert at["residual_error"] == (None if changes else 0)


# --- the reach of float16 ---


@dataclass(frozen=True)
class Times(Problem):
    """The loss times a factor."""

    factor: float = 1.0

    def at_levels(
        self, batch: Batch, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        losses, outputs = super().at_levels(batch, r, t, progress)
        return self.factor * losses, outputs


def gradient(p: Problem, batch: Batch, factor: float = 1.0) -> Tensor:
    p = Times(**vars(p) | {"factor": factor})
    p.backward(batch, *p.levels(batch, N))
    return torch.cat([w.grad.flatten() for w in p.net.parameters()])


def conv_net(precision: str) -> Problem:
    """A U-Net and its denoising head, neither at zero."""
    net = build(Unet(width=8, levels=2), (1, 8, 8), 0.0, 0, "student", precision, head=True)
    for out in (net.out, net.head):
        nn.init.normal_(out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return problem(net, precision=precision, auxiliary=DenoisingHead())[0]


def images(rows: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, rows, 1, 8, 8, generator=generator)
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    return Batch(0.5 * x, z, u, torch.tensor(1), torch.tensor(2))


@pytest.mark.parametrize("power", [-100, -75, -20, 20, 75, 100])
def test_a_gradient_in_float16_knows_no_size(power: int) -> None:
    p, batch = conv_net("float16"), images()
    found, expected = gradient(p, batch, 2.0**power), gradient(p, batch)
    assert torch.equal(found, expected * 2.0**power) and expected.abs().min() > 0
    exact = gradient(conv_net("float32"), batch)
    assert (expected - exact).norm() < 2e-3 * exact.norm()
    # as autograd would go through the network: what is small is lost, what is large is infinite
    (p.losses(batch, N).mean() * 2.0**power).backward()
    plain = torch.cat([w.grad.flatten() for w in p.net.parameters()])
    assert not (plain / 2.0**power - expected).norm() < 0.1 * expected.norm()


def test_nothing_and_nonsense_stay_what_they_are_in_float16() -> None:
    p, batch = conv_net("float16"), images()
    assert not gradient(p, batch, 0.0).any()
    for factor in (math.inf, math.nan):
        assert not gradient(p, batch, factor).isfinite().any()


def test_float16_rounds_an_eighth_of_bfloat16() -> None:
    batch = images()
    exact, one, other = (gradient(conv_net(p), batch) for p in ("float32", "float16", "bfloat16"))
    assert 5 < (other - exact).norm() / (one - exact).norm() < 12


# --- the mean's error beside noise ---

DIRECTIONS, BIAS, SPREAD, ROUGH = 2000, 0.3, 0.1, 0.05


@dataclass(frozen=True)
class Noisy(Problem):
    """Gradients z / 10 about a unit vector; `rough` ones are off by a fixed vector of length BIAS
    and by noise of their own."""

    rough: bool = False

    def at_levels(
        self, batch: Batch, r: Tensor, t: Tensor, progress: Tensor | float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        mean = torch.zeros(DIRECTIONS)
        mean[0], mean[1] = 1.0, BIAS * self.rough
        rows = mean + SPREAD * batch.z + ROUGH * self.rough * batch.z.roll(1, 1)
        return rows @ self.net.weight[0], []


def noisy(seed: int) -> dict[str, float]:
    x = torch.zeros(2, DIRECTIONS)
    p, _ = problem(nn.Linear(DIRECTIONS, 1, bias=False), objective=Continuous())
    exact = Noisy(p.factors, p.sigma, p.net, p.known)
    dataset = Dataset(x, x, (DIRECTIONS,), 1.0, "")
    changes = {"levels": [], "rows": 4, "batches": 12}
    return rounding(replace(exact, rough=True), exact, dataset, seed=seed, **changes)["law"]


def test_noise_does_not_pass_for_bias_and_the_jackknife_is_calibrated() -> None:
    """Rounding's noise, 25 to one above its bias in square, is left out of the mean's error."""
    found = [noisy(seed) for seed in range(60)]
    own = DIRECTIONS * ROUGH**2 / 4
    assert own > 10 * BIAS**2
    noise = DIRECTIONS * SPREAD**2 / 4
    truth = {
        "squared_bias": BIAS**2,
        "error": math.sqrt((BIAS**2 + own) / (1 + noise)),
        "error_over_noise": math.sqrt((BIAS**2 + own) / noise),
    }
    for name, expected in truth.items():
        values = np.array([at[name] for at in found])
        spread, errors = values.std(ddof=1), np.array([at[f"{name}_se"] for at in found])
        assert abs(values.mean() - expected) < 4 * spread / math.sqrt(60) + 0.01 * expected, name
        assert 0.7 < np.sqrt((errors**2).mean()) / spread < 1.4, name
    naive = BIAS**2 + own / 12  # the square of a mean over batches holds its noise
    assert naive > 2 * np.mean([at["squared_bias"] for at in found])
    for at in found:
        assert at["bias"] == pytest.approx(math.sqrt(at["squared_bias"]))


# --- what is matched ---


def test_the_twin_has_the_same_weights_and_every_network_of_the_run() -> None:
    f = {"score": Own(), "auxiliary": DenoisingHead(), "target": Ema(mu=0.9)}
    net = build(Mlp(width=16, depth=1), (D,), 0.0, 0, "student", "bfloat16", head=True)
    for out in (net.out, net.head):
        nn.init.normal_(out.weight, generator=torch.Generator().manual_seed(1))
    p, dataset = problem(net, precision="bfloat16", **f)
    average, own = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    known = replace(p.known, own=head_denoiser(own, SIGMA), teachers={"edm": lambda x, t: x})
    p = replace(p, average=average, own=own, known=known)
    exact = in_float32(p)
    for name in ("net", "average", "own"):
        one, other = getattr(p, name), getattr(exact, name)
        assert (one.dtype, other.dtype) == (torch.bfloat16, torch.float32)
        assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert exact.known.teachers is p.known.teachers
    x, t = torch.ones(4, D), torch.full((4,), 2.0)
    plain = build(Mlp(width=16, depth=1), (D,), 0.0, 0, "student", "float32", head=True)
    plain.load_state_dict(own.state_dict())
    assert torch.equal(exact.known.own(x, t), head_denoiser(plain, SIGMA)(x, t))
    assert not torch.equal(exact.known.own(x, t), p.known.own(x, t))
    assert 0 < rounding(p, exact, dataset)["error"][0] < 0.1
    net.compile()  # as on a GPU: the twin's float32 runs as it is written
    assert in_float32(p).net._compiled_call_impl is None is not net._compiled_call_impl


# --- in a study ---

ASKED = "  gradient_rounding: {sigmas: 3, batches: 4, at: [1.0]}\n"
HALF = replaced("variants:\n", "variants:\n  half: {from: cd, precision: bfloat16}\n") + ASKED


def test_variants_in_half_precision_are_measured_and_no_others(tmp_path: Path) -> None:
    study = read(tmp_path, HALF, ("seeds=[0]",))
    plain = read(tmp_path, sets=("seeds=[0]",))
    assert {r.id for r in plain.runs} < {r.id for r in study.runs}
    store = Store(tmp_path / "results", study)
    asked = {}
    for run in study.runs:
        kinds = [s for s in run.measures if s.record["kind"] == "gradient_rounding"]
        asked[run.recipe.name] = len(kinds)
        if run.recipe.name in ("edm", "half"):
            assert worker.work(run, study.unique, store.folders, "cpu") == worker.DONE
    assert asked == {"edm": 0, "ct": 0, "cd": 0, "half": 1}
    half = next(r for r in study.runs if r.recipe.name == "half")
    (file,) = store.folders[half.id].path.glob("measures/1.000-gradient_rounding-*.json")
    record = json.loads(file.read_text())
    assert record["settings"] == {"kind": "gradient_rounding", "ema": "raw", "sigmas": 3,
                                  "batches": 4, "at": 1.0}  # fmt: skip
    assert len(record["sigma"]) == 3 and all(0 < e < 0.2 for e in record["error"])
    assert all(0 < e < 2 for e in record["residual_error"])
    assert record["value"] == record["law"]["error"] < record["law"]["error_over_noise"]

    dataset = worker.load(half.recipe.factors.data, torch.device("cpu"))
    p, _ = instruments.problem_at(half, study.unique, store.folders.get, dataset,
                                  torch.device("cpu"), 1.0, {})  # fmt: skip
    exact = in_float32(p)
    sides = [probe(q, dataset, rows=8, batches=1) for q in (p, exact)]
    (batch,) = sides[0].drawn()
    at = p.levels(batch, N)
    (one,), (other,) = (q.known.teachers.values() for q in (p, exact))
    assert one is other
    rounded, true = (side.steps(batch, at) for side in sides)
    assert not torch.equal(rounded, true)


@pytest.mark.parametrize("text", [
    TWO_MODES + ASKED,
    HALF.replace("half: {from: cd,", "half: {from: cd, target: {kind: frozen, run: first},")
    .replace("sources:\n", "sources:\n  first: {from: ct}\n"),
    HALF.replace("half: {from: cd, precision: bfloat16}", "half: {from: cd, batch: 32}")
    .replace("{objective: denoising}", "{objective: denoising, precision: bfloat16}"),
], ids=["none", "a frozen target", "a source"])  # fmt: skip
def test_a_study_without_half_precision_has_nothing_to_ask(text: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="small.yaml: measure.gradient_rounding: no variant .*"
                                         "precision: float16"):  # fmt: skip
        read(tmp_path, text)


def test_a_unet_on_images_is_measured_at_every_level() -> None:
    net = build(Unet(width=8, levels=2), (1, 8, 8), 0.0, 0, "student", "bfloat16")
    nn.init.normal_(net.out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    dataset = data.load(Digits())
    f = Factors(data=Digits(), network=Unet(width=8), budget=Budget(images=1),
                discretization=Fixed(N=161), precision="bfloat16")  # fmt: skip
    p = Problem(f, Sigma(data=dataset.std), net)
    levels = [0.01, 0.5, 20.0]
    result = rounding(p, in_float32(p), dataset, N=161, levels=levels, rows=16, batches=4)
    assert all(1e-3 < e < 1 for e in (*result["error"], *result["residual_error"]))
    assert min(result["step_over_c"]) > 0
