"""The metrics that a study file's `measure` may ask for, each with its settings as data."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from study.factors import Score, SingleSample
from study.values import Name, Positive, Share, Value

Points = Annotated[tuple[Share, ...], Meta(min_length=1, max_length=100)]
Steps = Annotated[tuple[Annotated[int, Meta(ge=1, le=2)], ...], Meta(min_length=1, max_length=2)]
Lengths = Annotated[tuple[float, ...], Meta(min_length=1, max_length=16)]
Levels = Annotated[int, Meta(ge=2, le=1000)]
Batches = Annotated[int, Meta(ge=4, le=10_000)]
Draws = Annotated[int, Meta(ge=1, le=100)]
Samples = Annotated[int, Meta(ge=8, le=1_000_000)]
Parts = Annotated[tuple[Literal["train", "held_out"], ...], Meta(min_length=1, max_length=2)]


class Probe(Value, frozen=True, kw_only=True):
    """What every metric along training has: the shares at which; null: those of `measure`."""

    at: Points | None = None


class Metric(Probe, frozen=True, kw_only=True):
    """And what every metric of averaged weights has: which; null: the first of weights_ema."""

    ema: Lengths | None = None


class Fid(Metric, frozen=True):
    """Frechet distance in the features of a named extractor, mean over sampling draws, to as many
    images of each `reference`. weights: file of inception-v3-compat's; null: downloaded."""

    extractor: str
    samples: Samples
    weights: str | None = None
    reference: Parts = ("train", "held_out")
    nfe: Steps = (1, 2)
    mid: Positive = 0.821  # noise level of the second step (ECT's for CIFAR-10)
    draws: Draws = 3


class Kid(Metric, frozen=True):
    """Kernel distance (unbiased, may be negative), one subset of all n; null: as in `fid`."""

    extractor: str | None = None
    samples: Samples | None = None
    weights: str | None = None
    reference: Parts | None = None
    nfe: Steps | None = None
    mid: Positive | None = None
    draws: Draws | None = None


class SlicedWasserstein(Metric, frozen=True):
    """Sliced Wasserstein-2 distance of vector samples to as many fresh draws of the data."""

    samples: Samples = 2048
    nfe: Steps = (1, 2)
    mid: Positive = 0.821
    draws: Draws = 3
    projections: Annotated[int, Meta(ge=1, le=10_000)] = 128


class ModeMass(Metric, frozen=True):
    """Share of samples per mode of a mixture, and between modes (over 3 std from all of them)."""

    samples: Samples = 2048
    nfe: Steps = (1, 2)
    mid: Positive = 0.821
    draws: Draws = 3


class MapError(Metric, frozen=True):
    """RMS distance of f(x_t, t) to the exact consistency map of a mixture, over noise levels."""

    sigmas: Levels = 8
    samples: Samples = 512


class ScoreError(Value, frozen=True):
    """Variance and error of the variant's estimate of E[x | x_t], per noise level."""

    sigmas: Levels = 12
    samples: Samples = 2048


class GradientNoise(Probe, frozen=True):
    """Where the noise of the gradient comes from, per noise level and under the law: the estimate
    of the score, dropout's mask, the draw of (t, x_t); rho is the estimate's share. Also how far
    f(x_t, t) is from its target, beside the distance's c."""

    sigmas: Levels = 8
    batches: Batches = 16  # independent ones, of the run's own size


class GradientCosine(Probe, frozen=True):
    """Cosine of the mean gradients that two scores give at the same weights, noise removed, per
    noise level and under the law."""

    against: Score
    score: Score = SingleSample()
    sigmas: Levels = 8
    batches: Batches = 16


class GradientSlopes(Probe, frozen=True):
    """How the losses and gradients of two scores come together as N grows, at the same weights."""

    against: Score
    score: Score = SingleSample()
    N: Annotated[tuple[Annotated[int, Meta(ge=2, le=1_000_000)], ...], Meta(min_length=2)] = (
        *(20, 40, 80, 160, 320),
    )
    batches: Batches = 16


class GradientRounding(Probe, frozen=True):
    """What half precision does to the gradient: the run's own against one in float32 at the same
    weights on the same batches, per noise level and under the law; and the same of the difference
    f(x_t, t) - f^-(x_r, r). Of variants that are trained in half precision."""

    sigmas: Levels = 8
    batches: Batches = 16


class Trajectories(Metric, frozen=True):
    """Is it one trajectory, one output? Distance of f(x_t, t) to the end of the PF-ODE through x_t
    under each known score, and the spread of f along one trajectory, per noise level. teachers:
    denoising sources; the distance between the ends of the first two is the floor."""

    teachers: tuple[Name, ...] = ()
    sigmas: Levels = 8
    samples: Samples = 256
    steps: Annotated[int, Meta(ge=8, le=4096)] = 64  # Heun steps over the whole range


class Memorisation(Metric, frozen=True):
    """Are samples nearer to training images than held-out images are?"""

    samples: Samples
    nfe: Steps = (1,)
    mid: Positive = 0.821


class Coverage(Metric, frozen=True):
    """Precision and recall (k nearest neighbours in the extractor's features) and the histogram of
    classes that its classifier, if in-domain, sees, against training images; null: as in `fid`."""

    extractor: str | None = None
    samples: Samples | None = None
    weights: str | None = None
    neighbours: Annotated[int, Meta(ge=1, le=100)] = 3
    nfe: Steps = (1,)
    mid: Positive = 0.821


class Pushforward(Metric, frozen=True):
    """On one-dimensional data: the prior's quantiles sent through f, their Wasserstein-2 distance
    to the data's, and the mass that lands between modes (over `reach` std from each)."""

    points: Annotated[int, Meta(ge=100, le=10_000_000)] = 20_000
    reach: Positive = 4.0


class Measure(Value, frozen=True):
    """What a study measures, and at which shares of each run's budget."""

    at: Points = (0.25, 0.5, 1.0)
    fid: Fid | None = None
    kid: Kid | None = None
    sliced_wasserstein: SlicedWasserstein | None = None
    mode_mass: ModeMass | None = None
    map_error: MapError | None = None
    score_error: ScoreError | None = None
    gradient_noise: GradientNoise | None = None
    gradient_cosine: GradientCosine | None = None
    gradient_slopes: GradientSlopes | None = None
    gradient_rounding: GradientRounding | None = None
    trajectories: Trajectories | None = None
    memorisation: Memorisation | None = None
    coverage: Coverage | None = None
    pushforward: Pushforward | None = None


# of raw weights, as trained
