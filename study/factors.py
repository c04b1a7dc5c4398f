"""Factor space: every independently switchable part of a training method, as data.

No method is a class. A variant names one value per factor, and a value is a small frozen struct
tagged by its `kind`. All defaults stand here, in one place; the identity of a run is its
difference from them (see `identity`). Notation: x_t = x + t z with z ~ N(0, I), noise levels r <
t, D^ an estimate of E[x | x_t], f the consistency model, D the denoiser, d the loss's distance.

Adding a value: a struct here, its `case` in the module that acts on it, a closed-form test.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from study.subjects import Data, Network
from study.values import Decay, Kind, Name, Noise, Positive, Share, Steps, Value

# --- what is learned ---


class Consistency(Kind, frozen=True, tag="consistency"):
    """E[w d(f(x_t, t), f^-(x_r, r))] with x_r one solver step from x_t along the score D^
    gives."""


class Denoising(Kind, frozen=True, tag="denoising"):
    """EDM's denoising score matching, E[w |D(x_t, t) - x|^2]."""


class Continuous(Kind, frozen=True, tag="continuous"):
    """sCM (Lu & Song 2024): the consistency loss's gradient at r -> t, by forward differentiation
    of the model along dx/dt = (x_t - D^) / t, in float32. With D^ = x it is sCT, else sCD.

    warm_up: share of the budget over which the tangent's second half grows in; c: the tangent g
    enters as g / (|g| + c).
    """

    warm_up: Annotated[float, Meta(ge=0, le=1)] = 0.025
    c: Positive = 0.1


MOST_TERMS = 1000  # components of the law of a mean of posterior draws that a fixed point can keep


class FixedPoint(Kind, frozen=True, tag="fixed_point"):
    """The oracle, on a one-dimensional mixture: what the loss would converge to, computed and not
    trained. CT by dynamic programming over the grid, CD by composing its solver's steps."""


class SingleSample(Kind, frozen=True, tag="single_sample"):
    """D^ = x: consistency training. Unbiased given x_t, covariance Cov[x | x_t]."""


class Teacher(Kind, frozen=True, tag="teacher"):
    """D^ = D_phi(x_t, t) of a trained source: consistency distillation. No variance given x_t."""

    run: Name


class Empirical(Kind, frozen=True, tag="empirical"):
    """D^ = E[x | x_t] under the finite training set, exactly. No variance given x_t."""


class Analytic(Kind, frozen=True, tag="analytic"):
    """D^ = E[x | x_t] under the known population density. No variance, no bias."""


class Blend(Kind, frozen=True, tag="blend"):
    """D^ = (1 - alpha) D_phi + alpha D_ref + beta (x - D_ref): mean and noise, set apart. D_ref is
    the posterior mean E[x | x_t] of what x is drawn from: the training set, or endless data.

    CD is (0, 0), CT (1, 1), the exact score (1, 0), noisy CD (0, 1). run: the denoiser D_phi, not
    needed at alpha = 1. residual: `posterior`, x - D_ref itself, or `gaussian`, normal noise of
    its covariance, which never jumps between images.
    """

    alpha: Annotated[float, Meta(ge=-10, le=10)]
    beta: Annotated[float, Meta(ge=-10, le=10)]
    run: Name | None = None
    residual: Literal["posterior", "gaussian"] = "posterior"


class KSample(Kind, frozen=True, tag="k_sample"):
    """D^ = the self-normalised mean over n references, x itself and n - 1 drawn from the training
    set, or of endless data from the batch (STF, Xu et al. 2023). shared: one set of references for
    the whole batch, whose noise is then common to its rows."""

    n: Annotated[int, Meta(ge=1, le=1_000_000)]
    shared: bool = False


class PosteriorK(Kind, frozen=True, tag="posterior_k"):
    """D^ = the mean of k exact draws from the posterior, x one of them: averaged inside the step.
    Mean E[x | x_t], covariance Cov[x | x_t] / k."""

    k: Annotated[int, Meta(ge=1, le=10_000)]


class Own(Kind, frozen=True, tag="own"):
    """D^ = (1 - a) x + a D_own: D_own is the student's own denoising head under an average of its
    weights (decay mu), without gradient; a grows from 0 to 1 over the share `ramp` of training.
    Needs the auxiliary head."""

    mu: Decay = 0.999
    ramp: Share = 0.1


Inner = SingleSample | Teacher | Empirical | Analytic | Blend | KSample | PosteriorK


class Windowed(Kind, frozen=True, tag="windowed"):
    """One score for t in (t_low, t_high], another outside of it."""

    inside: Inner
    outside: Inner
    t_low: Annotated[float, Meta(ge=0, le=1e6)]
    t_high: Noise


class FromRun(Kind, frozen=True, tag="run"):
    """Weights of a source of the same block, its first EMA."""

    run: Name


class FromWeights(Kind, frozen=True, tag="weights"):
    """Weights of a file from outside: an EDM or ECT snapshot (.pkl), a state dict or a snapshot of
    a run (.pt, .pth; its first EMA), .safetensors. The file is known by its name, the last part of
    the path, and may move; its digest stands in trained.json."""

    weights: Annotated[
        str,
        Meta(
            pattern=r"[^/]\.(pkl|pt|pth|safetensors)$",
            description="a .pkl, .pt, .pth or .safetensors file",
        ),
    ]


class NoHead(Kind, frozen=True, tag="none"):
    """No auxiliary loss."""


class FromData(Kind, frozen=True, tag="data"):
    """Labels x, the clean image."""


class DenoisingHead(Kind, frozen=True, tag="denoising_head"):
    """A second head D on the student's trunk, trained beside f (never through it) on EDM's
    denoising loss per dimension, times `weight`. labels: the data, or a source's D_phi(x_t, t)."""

    weight: Positive = 1.0
    labels: FromData | FromRun = FromData()


class Random(Kind, frozen=True, tag="random"):
    """Weights addressed by (seed, role, parameter name)."""


class Stopgrad(Kind, frozen=True, tag="stopgrad"):
    """f^- = the student's own current weights, without gradient."""


class Ema(Kind, frozen=True, tag="ema"):
    """f^- = a running average of the student's weights, theta^- <- mu theta^- + (1 - mu) theta
    after every update.

    Without s0 mu is constant. With s0 it is CM's schedule mu(N) = mu^(s0 / N) = exp(s0 ln mu / N):
    mu itself at the first N = s0, nearer to 1 as N grows.
    """

    mu: Decay
    s0: Steps | None = None


class Frozen(Kind, frozen=True, tag="frozen"):
    """f^- = g, a finished consistency model, and the loss is d(f(x_t, t), g(x_t, t))."""

    run: Name


class Euler(Kind, frozen=True, tag="euler"):
    """x_r = x_t + (r - t) (x_t - D^) / t."""


class Heun(Kind, frozen=True, tag="heun"):
    """An Euler step, its slope then averaged with the slope at its end (second order). With
    D^ = x the path is straight and this is Euler."""


# --- noise levels, loss, optimiser ---


class Fixed(Kind, frozen=True, tag="fixed"):
    """N grid points throughout."""

    N: Annotated[int, Meta(ge=2, le=1_000_000)]


class Doubling(Kind, frozen=True, tag="doubling"):
    """iCT: N = min(s0 2^floor(k / K'), s1) + 1 grid points, doubled at equal shares of
    training."""

    s0: Steps = 10
    s1: Steps = 1280


class Progressive(Kind, frozen=True, tag="progressive"):
    """CM: N = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 grid points at update k of K."""

    s0: Annotated[int, Meta(ge=2, le=1_000_000)] = 2
    s1: Steps = 150


class EctMapping(Kind, frozen=True, tag="ect"):
    """ECT: no grid; r = t (1 - q^-(s + 1) n(t)), n(t) = 1 + k sigmoid(-b t), not below sigma_min,
    at stage s of `stages`, equal shares of training (Geng et al. 2024)."""

    q: Annotated[float, Meta(gt=1, le=10_000)] = 2.0
    k: Annotated[float, Meta(ge=0, le=1000)] = 8.0
    b: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    stages: Annotated[int, Meta(ge=1, le=64)] = 8


class UniformGrid(Kind, frozen=True, tag="uniform_grid"):
    """CM: uniform in sigma^(1/rho) on [sigma_min, sigma_max], so that every interval of the grid
    is as likely. Where nothing is discretised t is sigma itself."""


class LognormalGrid(Kind, frozen=True, tag="lognormal_grid"):
    """iCT: ln sigma ~ N(P_mean, P_std^2) on [sigma_min, sigma_max]; (r, t) are the ends of the
    grid interval it falls in. Where nothing is discretised t is sigma itself."""

    P_mean: Annotated[float, Meta(ge=-10, le=10)] = -1.1
    P_std: Annotated[float, Meta(ge=0.01, le=100)] = 2.0


class LogUniform(Kind, frozen=True, tag="log_uniform"):
    """ln sigma uniform on [sigma_min, sigma_max]; on a grid as for the others."""


class InverseStep(Kind, frozen=True, tag="inverse_step"):
    """w = 1 / (t - r)."""


class Uniform(Kind, frozen=True, tag="uniform"):
    """w = 1."""


class Edm(Kind, frozen=True, tag="edm"):
    """w = (t^2 + s^2) / (t s)^2, s = sigma_data: EDM's weight of a denoising loss."""


class L1(Kind, frozen=True, tag="l1"):
    """sum |a - b| / d, the mean over dimensions."""


class L2Norm(Kind, frozen=True, tag="l2_norm"):
    """|a - b|, not squared: pseudo_huber at c = 0 (ECT on CIFAR-10)."""


class L2(Kind, frozen=True, tag="l2"):
    """|a - b|^2 / d, the mean over dimensions."""


class PseudoHuber(Kind, frozen=True, tag="pseudo_huber"):
    """sqrt(|a - b|^2 + c^2) - c with c = c0 sqrt(d)."""

    c0: Positive = 0.00054


class Adam(Kind, frozen=True, tag="adam"):
    """Adam at a constant learning rate."""

    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8


class RAdam(Kind, frozen=True, tag="radam"):
    """Rectified Adam (Liu et al. 2020) at a constant learning rate."""

    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8


class Budget(Value, frozen=True):
    """Training images: a number, or a share of the study's base budget. None (0) leaves the
    weights as `init` has them: a run that is measured, or read by others, as it came."""

    images: Annotated[int, Meta(ge=0)] | None = None
    share: Share | None = None


class Sigma(Value, frozen=True):
    """Noise levels [min, max], the grid's rho, and sigma_data (null: measured, global std)."""

    min: Noise = 0.002
    max: Noise = 80.0
    rho: Annotated[float, Meta(ge=1, le=100)] = 7.0
    data: Positive | None = None


Objective = Consistency | Denoising | Continuous | FixedPoint
Score = Inner | Windowed | Own
Init = Random | FromRun | FromWeights
Target = Stopgrad | Ema | Frozen
Solver = Euler | Heun
Discretization = Fixed | Doubling | Progressive | EctMapping
Law = LognormalGrid | UniformGrid | LogUniform
Weighting = InverseStep | Uniform | Edm
Distance = L2 | PseudoHuber | L2Norm | L1
Auxiliary = NoHead | DenoisingHead
Optimizer = Adam | RAdam
Precision = Literal["float32", "bfloat16", "float16"]


class Factors(Value, frozen=True):
    """A point in factor space: everything that makes one training run, seed and role aside."""

    data: Data
    network: Network
    budget: Budget
    objective: Objective = Consistency()
    score: Score = SingleSample()
    repeat: Annotated[int, Meta(ge=1, le=1000)] = 1
    init: Init = Random()
    target: Target = Stopgrad()
    solver: Solver = Euler()
    discretization: Discretization = Doubling()
    law: Law = LognormalGrid()
    weighting: Weighting = InverseStep()
    distance: Distance = PseudoHuber()
    auxiliary: Auxiliary = NoHead()
    augment: Literal["none", "flip"] = "none"  # flip: x is as likely mirrored, left and right
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    optimizer: Optimizer = Adam()
    batch: Annotated[int, Meta(ge=1, le=1_000_000)] = 128
    weights_ema: Annotated[
        tuple[Annotated[float, Meta(ge=0.001, le=0.25)], ...], Meta(min_length=1, max_length=16)
    ] = (0.05, 0.1)
    precision: Precision = "float32"
    sigma: Sigma = Sigma()
    data_stream: Annotated[int, Meta(ge=0, le=2**31)] = 0
