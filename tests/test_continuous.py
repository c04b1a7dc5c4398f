"""The continuous-time loss: finite differences, exact maps, the limit of the discrete loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from studies import read
from torch import Tensor, nn

from study import consistency, continuous, networks, worker
from study.consistency import along
from study.continuous import tangent
from study.data import Batch
from study.factors import (
    L2,
    Analytic,
    Budget,
    Consistency,
    Continuous,
    Factors,
    Sigma,
    SingleSample,
    Teacher,
    Uniform,
)
from study.losses import Problem
from study.mixtures import GaussianMixture
from study.models import finished
from study.probes import map_error
from study.scores import Knowledge
from study.store import Store
from study.subjects import DdpmPP, Mixture, Mlp, Network, Unet

KEY, DRAW = torch.tensor(77), torch.tensor(78)
SIGMA = Sigma(data=0.5)
KINDS = [
    (Mlp(width=16, depth=2), (3,)),
    (Unet(width=8, levels=2), (1, 5, 5)),
    (DdpmPP(width=8, mult=(1, 2), blocks=1, attention=(4,)), (1, 4, 4)),
]
WHOLE = 1.0  # the tangent's second half at full size


def network(kind: Network, shape: tuple[int, ...], drop: float = 0.0, **more: object) -> nn.Module:
    """A network in float64, what starts at zero or near it switched on."""
    net = networks.build(kind, shape, drop, 0, "student", **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1 and weight.abs().max() < 1e-3:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.copy_(drawn / math.sqrt(weight[0].numel()))
    return net.double()


def points(shape: tuple[int, ...], n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean x and noisy x_t (n, ...) at levels t (n,) from .05 to 50, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, n, *shape, generator=generator, dtype=torch.float64)
    t = torch.logspace(math.log10(0.05), math.log10(50), n, dtype=torch.float64)
    return 0.5 * x, 0.5 * x + along(t, x) * z, t


class Exact(nn.Module):
    """F of the exact map from t to 0 of N(m, v^2): f = m + v (x_t - m) / sqrt(v^2 + t^2)."""

    def __init__(self, m: float, v: float) -> None:
        super().__init__()
        self.m, self.v = m, v

    def body(self, y: Tensor, label: Tensor, key: Tensor | None) -> Tensor:
        """From EDM's preconditioning, F = (f - c_skip x_t) / c_out."""
        s, t = SIGMA.data, along((4 * label).exp(), y)
        root = (s**2 + t**2).sqrt()
        x_t = y * root
        f = self.m + self.v * (x_t - self.m) / (self.v**2 + t**2).sqrt()
        return (f - s**2 / root**2 * x_t) / (t * s / root)


def posterior_mean(m: float, v: float, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x | x_t] on N(m, v^2)."""
    return m + v**2 / (v**2 + along(t, x_t) ** 2) * (x_t - m)


# --- the tangent ---


@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=str)
def test_derivative_along_the_ode_is_the_finite_difference(
    kind: Network, shape: tuple[int, ...]
) -> None:
    """The second half is cos sin (x' + s dG/dtheta); x' moves to x' + h dx'/dtheta, the label to
    that of s tan(theta + h), under one dropout mask."""
    net, s, h = network(kind, shape, 0.3), SIGMA.data, 1e-6
    x, x_t, t = points(shape)
    theta = torch.atan(t / s)
    cos, sin = along(theta.cos(), x), along(theta.sin(), x)
    halves = [tangent(net, x_t, t, x, SIGMA, KEY, warm)[1] for warm in (0.0, WHOLE)]
    found = ((halves[0] - halves[1]) / (cos * sin) - cos * x_t) / s
    z = (x_t - x) / along(t, x)  # D^ = x: dx'/dtheta = cos s z - sin x
    slope = cos * s * z - sin * x

    def G(h: float) -> Tensor:
        label = (s * torch.tan(theta + h)).log() / 4
        with torch.no_grad():
            return -net.body((cos * x_t + h * slope) / s, label, KEY).view_as(x)

    expected = (G(h) - G(-h)) / (2 * h)
    # G is returned in float32, and cos sin divides it where t is small or large
    slack = (1e-6 * (1 + G(0).abs()) / (cos * sin)).amax(tuple(range(1, x.ndim)))
    error = (found - expected).flatten(1).abs().amax(1)
    assert (error <= 1e-5 * expected.flatten(1).norm(dim=1) + slack).all()
    assert expected.abs().max() > 1
    other = tangent(net, x_t, t, x, SIGMA, KEY + 1, WHOLE)[1]
    assert (other - halves[1]).abs().max() > 1e-2  # the mask matters


@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=str)
def test_tangent_is_cos_times_the_models_derivative_along_the_exact_trajectory(
    kind: Network, shape: tuple[int, ...]
) -> None:
    """g = cos(theta) df/dtheta on N(m, v^2), whose flow is (x_t - m) / sqrt(v^2 + t^2) = const,
    with f in EDM's preconditioning and nothing of TrigFlow."""
    m, v, s, h = 0.3, 0.8, SIGMA.data, 1e-6
    net = network(kind, shape, 0.3)
    _, x_t, t = points(shape)
    theta = torch.atan(t / s)

    def f(h: float) -> Tensor:
        level = s * torch.tan(theta + h)
        x = m + along(((v**2 + level**2) / (v**2 + t**2)).sqrt(), x_t) * (x_t - m)
        with torch.no_grad():
            F = net.body(consistency.scaled(x, level, SIGMA), level.log() / 4, KEY).view_as(x)
        return consistency.denoised(F, x, level, SIGMA)

    expected = along(theta.cos(), x_t) * (f(h) - f(-h)) / (2 * h)
    target, g = tangent(net, x_t, t, posterior_mean(m, v, x_t, t), SIGMA, KEY, WHOLE)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=3e-6 * expected.abs().max().item())
    with torch.no_grad():
        G = -net.body(consistency.scaled(x_t, t, SIGMA), t.log() / 4, KEY).view_as(x_t)
    torch.testing.assert_close(target.double(), G, rtol=1e-6, atol=1e-6)
    assert not target.requires_grad and not g.requires_grad


@pytest.mark.parametrize(("m", "v"), [(0.0, 0.5), (0.7, 0.5), (-0.4, 1.3)])
def test_tangent_of_the_exact_map_along_the_exact_score_is_zero(m: float, v: float) -> None:
    _, x_t, t = points((4,), 60)
    D = posterior_mean(m, v, x_t, t)
    _, g = tangent(Exact(m, v), x_t, t, D, SIGMA, None, WHOLE)
    first = tangent(Exact(m, v), x_t, t, D, SIGMA, None, 0.0)[1]
    assert g.abs().max() < 1e-5  # what is left are float32's roundings of G
    assert first.abs().max() > 0.05  # the second half takes this away
    wrong = tangent(Exact(m, v), x_t, t, D + 0.1, SIGMA, None, WHOLE)[1]
    assert wrong.abs().max() > 0.02  # not so for another score


@pytest.mark.parametrize("t", [0.2, 1.0, 10.0])
def test_mean_tangent_of_single_samples_is_that_of_the_exact_score(t: float) -> None:
    """g is affine in D^, so E[g(x) | x_t] = g(E[x | x_t]); for the exact map of a Gaussian 0."""
    n = 100_000
    for mixture, net, mean in [
        (GaussianMixture.from_lists([[0.7]], [0.3], [1.0], torch.float64), Exact(0.7, 0.3), 0.0),
        (
            GaussianMixture.from_lists([[-1.0], [1.0]], [0.2, 0.1], [1, 2], torch.float64),
            network(Mlp(width=8, depth=1), (1,)),
            None,
        ),
    ]:
        for value in (-0.8, 0.1, 1.5):
            x_t, level = torch.full((n, 1), value).double(), torch.full((n,), t).double()
            x = mixture.posterior_draws(x_t, level, DRAW, 1)[0]
            g = tangent(net, x_t, level, x, SIGMA, None, WHOLE)[1][:, 0]
            D = mixture.denoiser(x_t[:1], level[:1])
            exact = tangent(net, x_t[:1], level[:1], D, SIGMA, None, WHOLE)[1].item()
            error = g.std().item() / math.sqrt(n)
            assert abs(g.mean().item() - exact) < 4 * error + 1e-5
            assert error > 1e-6  # row by row they are not the same
            assert mean is None or abs(exact) < 1e-5


# --- the loss ---


def drawn(mixture: GaussianMixture, n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = mixture.sample(n, generator)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return Batch(x, z, u, KEY, DRAW)


def factors(**changes: object) -> Factors:
    plain = {
        "data": Mixture(means=((0.0,),), std=0.5),
        "network": Mlp(),
        "budget": Budget(images=1),
        "objective": Continuous(),
    }
    return Factors(**plain | changes)


CLOUDS = GaussianMixture.from_lists([[-1.0, 0.2], [0.7, 0.9]], [0.3, 0.5], [1, 2], torch.float64)


@pytest.mark.parametrize("score", [SingleSample(), Analytic()], ids=str)
def test_gradient_is_the_limit_of_the_discrete_losss(score: SingleSample | Analytic) -> None:
    """L2, no gradient through the target, at r = (1 - e) t. The discrete gradient of a row is
    2 w df . grad f / d with df = (t - r) (s / (s^2 + t^2)) df/dtheta and grad f = -s sin grad G,
    the continuous one -2 cos df/dtheta grad G / d, so w = 1 / ((t - r) sin cos) makes them equal.
    A large c leaves g as it is but for the factor 1 / c."""
    sigma, c, b = Sigma(min=1e-6, data=0.5), 1e6, drawn(CLOUDS, 300)
    t = 0.05 * (100**b.u)  # to 5
    theta = torch.atan(t / sigma.data)
    net, known = network(Mlp(width=16, depth=2), (2,), 0.2), Knowledge(density=CLOUDS)
    plain = {"score": score, "distance": L2(), "weighting": Uniform(), "dropout": 0.2}

    def gradient(rows: Tensor) -> Tensor:
        net.zero_grad()
        rows.sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()]).clone()

    problem = Problem(factors(objective=Continuous(c=c), score=score), sigma, net, known)
    limit = c * gradient(problem.at_levels(b, t, t)[0])
    found = []
    for e in (0.1, 0.01, 0.001):
        discrete = Problem(factors(objective=Consistency(), **plain), sigma, net, known)
        rows = discrete.at_levels(b, (1 - e) * t, t)[0]
        gradients = gradient(rows / (e * t * theta.sin() * theta.cos()))
        cosine = torch.cosine_similarity(gradients, limit, dim=0).item()
        found.append((1 - cosine, (gradients.norm() / limit.norm() - 1).abs().item()))
    assert found[2][0] < 1e-5 and found[2][1] < 5e-3
    assert found[0][0] > 10 * found[1][0] > 100 * found[2][0]  # one minus cosine falls like e^2
    assert found[0][1] > 5 * found[1][1] > 25 * found[2][1]  # the length like e


def test_loss_is_the_normalised_tangents_square() -> None:
    """|g / (|g| + c)|^2 / d: with |g| >> c it is 1 / d, whatever the level."""
    net, b = network(Mlp(width=16, depth=2), (2,)), drawn(CLOUDS, 50)
    t = torch.logspace(-1, 1, 50).double()
    x_t = b.x + t[:, None] * b.z
    norm = tangent(net, x_t, t, b.x, SIGMA, KEY, WHOLE)[1].norm(dim=1)
    for c in (0.1, 3.0, 1e-9):
        rows = Problem(factors(objective=Continuous(c=c)), SIGMA, net).at_levels(b, t, t)[0]
        torch.testing.assert_close(rows.detach(), (norm / (norm + c)).square() / 2)
    torch.testing.assert_close(rows.detach(), torch.full_like(rows, 0.5))


def test_warm_up_grows_the_second_half_in() -> None:
    """At first g = -cos^2 (s G - dx'/dtheta), by hand; half-way through the warm-up, half."""
    net, b, s = network(Mlp(width=16, depth=2), (2,)), drawn(CLOUDS, 50), SIGMA.data
    t = torch.logspace(-1, 1, 50).double()
    theta, x_t = torch.atan(t / s)[:, None], b.x + t[:, None] * b.z
    with torch.no_grad():
        G = -net.body(theta.cos() * x_t / s, t.log() / 4, None)
    first = -(theta.cos() ** 2) * (s * G - (theta.cos() * s * b.z - theta.sin() * b.x))
    whole = tangent(net, x_t, t, b.x, SIGMA, KEY, WHOLE)[1]
    c = 1e6  # so that a row of the loss is |g|^2 / (d c^2)
    for share, progress, w in [
        (0.025, 0.0, 0.0),
        (0.025, 0.0125, 0.5),
        (0.5, 0.125, 0.25),
        (0.025, 0.025, 1.0),
        (0.025, 0.7, 1.0),
        (0.0, 0.0, 1.0),  # no warm-up
    ]:
        problem = Problem(factors(objective=Continuous(warm_up=share, c=c)), SIGMA, net)
        expected = (first + w * (whole - first)).square().sum(1) / 2
        for now in (progress, torch.tensor(progress).double()):  # a captured step has a tensor
            rows = problem.at_levels(b, t, t, now)[0].detach() * c**2
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-7)
    assert (whole - first).norm() > 0.1 * first.norm()


def test_trained_and_distilled_differ_in_the_estimate_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, b, seen = network(Mlp(width=16, depth=2), (2,), 0.2).float(), drawn(CLOUDS, 50), []
    b = Batch(b.x.float(), b.z.float(), b.u, b.mask, b.draw)
    original = continuous.losses

    def noted(*arguments: object) -> Tensor:
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(continuous, "losses", noted)

    def rows(score: SingleSample | Teacher, teacher: object = None) -> Tensor:
        known = Knowledge(teachers={"edm": teacher})
        return Problem(factors(score=score), SIGMA, net, known).losses(b, 2).detach()

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x_t / (1 + t[:, None])

    sct = rows(SingleSample())
    assert torch.equal(sct, rows(Teacher(run="edm"), lambda x_t, t: b.x))  # a teacher that says x
    scd = rows(Teacher(run="edm"), teacher)
    assert not torch.equal(sct, scd)
    (one, _, other), D = seen, 5
    assert torch.equal(one[D], b.x)
    assert torch.equal(other[D], teacher(other[3], other[4]))
    for i, (a, c) in enumerate(zip(one, other, strict=True)):
        if isinstance(a, Tensor) and i != D:
            assert torch.equal(a, c)
        elif i != D:
            assert a == c


# --- precision ---


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Mlp(width=64, depth=2), (3,)), (Unet(width=16, levels=2), (1, 28, 28))],
    ids=str,
)
def test_under_bfloat16_the_tangent_stays_float32(kind: Network, shape: tuple[int, ...]) -> None:
    x, x_t, t = (v.float() for v in points(shape, 8))
    found, gradients = [], []
    for precision in ("float32", "bfloat16"):
        net = network(kind, shape, 0.2, precision=precision).float()
        target, g = tangent(net, x_t, t, x, SIGMA, KEY, WHOLE)
        assert target.dtype == g.dtype == torch.float32
        found.append((target, g))
        drawn = factors(network=kind, precision=precision, dropout=0.2)
        z = (x_t - x) / along(t, x)
        problem = Problem(drawn, SIGMA, net)
        problem.at_levels(Batch(x, z, t, KEY, DRAW), t, t)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    exact = tangent(
        network(kind, shape, 0.2), *(v.double() for v in (x_t, t, x)), SIGMA, KEY, WHOLE
    )
    for value, expected in zip(found[1], exact, strict=True):
        assert (value - expected).norm() < 1e-5 * expected.norm()
    # and the gradient is the same to the rounding of one pass forward and backward: were G^-
    # the tangent's own, the difference of the two precisions would be learned too, here 13 %
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert 1e-4 < error < 0.03


# --- trained end to end ---

STUDY = """\
question: Does the continuous loss reach the exact map?
primary: {variant: sct, against: scd, metric: map_error}
base:
  data: {kind: mixture, means: [[-1.0], [1.0]], std: 0.3}
  network: {kind: mlp, width: 64, depth: 2}
  budget: {images: 51200}
  batch: 128
  objective: continuous
  law: {kind: lognormal_grid, P_mean: -1.0, P_std: 1.4}
  optimizer: {kind: adam, lr: 2e-3, betas: [0.9, 0.99]}
variants:
  sct: {score: single_sample}
  scd: {score: analytic}
seeds: [0]
measure:
  at: [0.0025, 1.0]
  map_error: {sigmas: 8, samples: 512}
"""


def test_trained_and_distilled_models_come_near_the_exact_map(tmp_path: Path) -> None:
    study = read(tmp_path, STUDY)
    store, errors = Store(tmp_path / "results", study), {}
    for run in study.runs:
        assert worker.work(run, study.unique, store.folders, "cpu") == worker.DONE
        folder, f = store.folders[run.id], run.recipe.factors
        dataset = worker.load(f.data, torch.device("cpu"))
        sigma = Sigma(data=folder.trained["sigma_data"])
        for at in (0.0025, 1.0):
            model = finished(f, folder, dataset, torch.device("cpu"), 128, at)
            rms = map_error(model, dataset, sigma, 8, 512)["value"]
            errors[run.recipe.name, at] = rms
    for name in ("sct", "scd"):
        assert errors[name, 1.0] < errors[name, 0.0025] / 2
