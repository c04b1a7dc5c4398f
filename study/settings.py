"""What is measured, as data: the study file's `measure` and the settings record of each number.

A measurement is one number or curve from one snapshot under one settings record, kept in the file
measures/PROGRESS-KIND-DIGEST.json whose digest is over the record: unlike settings never share a
file. Variants are measured along training, sources at their end only; a denoising source with a
35-NFE Heun sampler (Karras et al. 2022), a consistency model with one and two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from study.extractors.names import extractor_identity
from study.factors import (
    Consistency,
    Continuous,
    Denoising,
    Factors,
    FixedPoint,
    Frozen,
    KSample,
    Name,
    Own,
    Positive,
    Score,
    Share,
    SingleSample,
    Value,
)
from study.identity import canonical, difference, digest
from study.meaning import endless, ignored

HEUN_NFE = 35
Points = Annotated[tuple[Share, ...], Meta(min_length=1, max_length=100)]
Steps = Annotated[tuple[Annotated[int, Meta(ge=1, le=2)], ...], Meta(min_length=1, max_length=2)]
Lengths = Annotated[tuple[float, ...], Meta(min_length=1, max_length=16)]
Levels = Annotated[int, Meta(ge=2, le=1000)]
Batches = Annotated[int, Meta(ge=4, le=10_000)]
Draws = Annotated[int, Meta(ge=1, le=100)]
Samples = Annotated[int, Meta(ge=8, le=1_000_000)]
Parts = Annotated[tuple[Literal["train", "held_out"], ...], Meta(min_length=1, max_length=2)]


class Fid(Value, frozen=True):
    """Frechet distance in the features of a named extractor, mean over sampling draws, to as many
    images of each `reference`. weights: file of inception-v3-compat's; null: downloaded."""

    extractor: str
    samples: Samples
    weights: str | None = None
    reference: Parts = ("train", "held_out")
    nfe: Steps = (1, 2)
    mid: Positive = 0.821  # noise level of the second step (ECT's for CIFAR-10)
    draws: Draws = 3
    ema: Lengths | None = None  # null: the first of weights_ema
    at: Points | None = None


class Kid(Value, frozen=True):
    """Kernel distance (unbiased, may be negative), one subset of all n; null: as in `fid`."""

    extractor: str | None = None
    samples: Samples | None = None
    weights: str | None = None
    reference: Parts | None = None
    nfe: Steps | None = None
    mid: Positive | None = None
    draws: Draws | None = None
    ema: Lengths | None = None
    at: Points | None = None


class SlicedWasserstein(Value, frozen=True):
    """Sliced Wasserstein-2 distance of vector samples to as many fresh draws of the data."""

    samples: Samples = 2048
    nfe: Steps = (1, 2)
    mid: Positive = 0.821
    draws: Draws = 3
    projections: Annotated[int, Meta(ge=1, le=10_000)] = 128
    ema: Lengths | None = None
    at: Points | None = None


class ModeMass(Value, frozen=True):
    """Share of samples per mode of a mixture, and between modes (over 3 std from all of them)."""

    samples: Samples = 2048
    nfe: Steps = (1, 2)
    mid: Positive = 0.821
    draws: Draws = 3
    ema: Lengths | None = None
    at: Points | None = None


class MapError(Value, frozen=True):
    """RMS distance of f(x_t, t) to the exact consistency map of a mixture, over noise levels."""

    sigmas: Levels = 8
    samples: Samples = 512
    ema: Lengths | None = None
    at: Points | None = None


class ScoreError(Value, frozen=True):
    """Variance and error of the variant's estimate of E[x | x_t], per noise level."""

    sigmas: Levels = 12
    samples: Samples = 2048


class GradientNoise(Value, frozen=True):
    """Where the noise of the gradient comes from, per noise level and under the law: the estimate
    of the score, dropout's mask, the draw of (t, x_t); rho is the estimate's share. Also how far
    f(x_t, t) is from its target, beside the distance's c."""

    sigmas: Levels = 8
    batches: Batches = 16  # independent ones, of the run's own size
    at: Points | None = None


class GradientCosine(Value, frozen=True):
    """Cosine of the mean gradients that two scores give at the same weights, noise removed, per
    noise level and under the law."""

    against: Score
    score: Score = SingleSample()
    sigmas: Levels = 8
    batches: Batches = 16
    at: Points | None = None


class GradientSlopes(Value, frozen=True):
    """How the losses and gradients of two scores come together as N grows, at the same weights."""

    against: Score
    score: Score = SingleSample()
    N: Annotated[tuple[Annotated[int, Meta(ge=2, le=1_000_000)], ...], Meta(min_length=2)] = (
        *(20, 40, 80, 160, 320),
    )
    batches: Batches = 16
    at: Points | None = None


class GradientRounding(Value, frozen=True):
    """What half precision does to the gradient: the run's own against one in float32 at the same
    weights on the same batches, per noise level and under the law; and the same of the difference
    f(x_t, t) - f^-(x_r, r). Of variants that are trained in half precision."""

    sigmas: Levels = 8
    batches: Batches = 16
    at: Points | None = None


class Trajectories(Value, frozen=True):
    """Is it one trajectory, one output? Distance of f(x_t, t) to the end of the PF-ODE through x_t
    under each known score, and the spread of f along one trajectory, per noise level. teachers:
    denoising sources; the distance between the ends of the first two is the floor."""

    teachers: tuple[Name, ...] = ()
    sigmas: Levels = 8
    samples: Samples = 256
    steps: Annotated[int, Meta(ge=8, le=4096)] = 64  # Heun steps over the whole range
    ema: Lengths | None = None
    at: Points | None = None


class Memorisation(Value, frozen=True):
    """Are samples nearer to training images than held-out images are?"""

    samples: Samples
    nfe: Steps = (1,)
    mid: Positive = 0.821
    ema: Lengths | None = None
    at: Points | None = None


class Coverage(Value, frozen=True):
    """Precision and recall (k nearest neighbours in the extractor's features) and the histogram of
    classes that its classifier, if in-domain, sees, against training images; null: as in `fid`."""

    extractor: str | None = None
    samples: Samples | None = None
    weights: str | None = None
    neighbours: Annotated[int, Meta(ge=1, le=100)] = 3
    nfe: Steps = (1,)
    mid: Positive = 0.821
    ema: Lengths | None = None
    at: Points | None = None


class Pushforward(Value, frozen=True):
    """On one-dimensional data: the prior's quantiles sent through f, their Wasserstein-2 distance
    to the data's, and the mass that lands between modes (over `reach` std from each)."""

    points: Annotated[int, Meta(ge=100, le=10_000_000)] = 20_000
    reach: Positive = 4.0
    ema: Lengths | None = None
    at: Points | None = None


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
PROBES = ("gradient_noise", "gradient_cosine", "gradient_slopes", "gradient_rounding")
IN_FEATURES = ("kid", "coverage")  # what they leave open is the fid's


def named_sources(value: object) -> list[str]:
    """The sources that a score or measurement consults."""
    if isinstance(value, Struct):
        inner = [n for f in value.__struct_fields__ for n in named_sources(getattr(value, f))]
        own = [value.run] if getattr(value, "run", None) else []
        return own + [n for n in inner if n not in own] + [*getattr(value, "teachers", ())]
    return []


@dataclass(frozen=True)
class Settings:
    """One measurement asked of a run: its progress and its settings record; outside of both, where
    the extractor's weights lie."""

    at: float
    record: Mapping[str, Any]
    consults: tuple[str, ...] = ()  # names of sources; ids once the seed is known
    weights: str | None = field(default=None, compare=False)

    def resolved(self, ids: Mapping[str, str]) -> Settings:
        """The same of one seed, every source by its id."""
        if not self.consults:
            return self
        record = _by_id(self.record, ids)
        return replace(self, record=record, consults=tuple(ids[name] for name in self.consults))

    @property
    def file(self) -> str:
        """Its name in the run's folder measures/."""
        return f"{self.at:.3f}-{self.record['kind']}-{digest(self.record, 8)}.json"


def _by_id(value: Any, ids: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Plain settings with the names of sources replaced."""
    if isinstance(value, Mapping):
        return {
            k: ids[v] if k == "run" else [ids[n] for n in v] if k == "teachers" else _by_id(v, ids)
            for k, v in value.items()
        }
    return value


def filled(measure: Measure, kind: str) -> Any:  # noqa: ANN401
    """What is asked of a kind, what it leaves open taken from the fid."""
    ask, fid = getattr(measure, kind), measure.fid
    if kind not in IN_FEATURES or ask is None or fid is None:
        return ask
    own = ask.extractor not in (None, fid.extractor)  # whose weights are its own as well
    left = [f for f in ask.__struct_fields__ if getattr(ask, f) is None and hasattr(fid, f)]
    shared = {f: getattr(fid, f) for f in left if not (own and f == "weights")}
    return msgspec.structs.replace(ask, **shared)


def settings_of(measure: Measure, factors: Factors, role: str) -> Iterator[Settings]:
    """Every measurement of this recipe's own snapshots."""
    for kind in measure.__struct_fields__:
        ask = filled(measure, kind)
        if kind in ("at", "score_error") or ask is None or not applies(kind, factors, role):
            continue
        plain = {
            f: difference(v) if isinstance(v := getattr(ask, f), Struct) else v
            for f in ask.__struct_fields__
        }
        points = plain.pop("at") or measure.at
        points = points if along(factors, role) else (1.0,)
        asked = plain.pop("ema", None)  # of variants; of a source, the weights that others read
        lengths = asked if asked and role == "student" else factors.weights_ema[:1]
        lengths = ("raw",) if kind in PROBES else lengths
        steps = plain.pop("nfe", (None,))
        if steps != (None,) and isinstance(factors.objective, Denoising):
            steps = (HEUN_NFE,)
        weights = plain.pop("weights", None)
        if "extractor" in plain:
            plain["extractor"] = extractor_identity(plain["extractor"], weights)
        against = dict.fromkeys(plain.pop("reference", (None,)))
        consults = tuple(dict.fromkeys(named_sources(ask)))
        for at in points:
            for ema, nfe, reference in product(lengths, steps, against):
                record = {"kind": kind, "ema": ema, **plain}
                if nfe is not None:
                    record |= {"nfe": nfe, "mid": plain["mid"] if nfe == 2 else None}
                if reference is not None:
                    record["reference"] = reference
                yield Settings(at, record, consults, weights)


def applies(kind: str, factors: Factors, role: str) -> bool:
    """Whether a measurement makes sense of such a run. An oracle has its map and nothing else; a
    source is measured by its samples alone; the gradient is probed where there is training."""
    objective, probe = factors.objective, kind in PROBES
    if isinstance(objective, FixedPoint):
        return kind == "pushforward"
    if isinstance(objective, Denoising):
        return not probe and kind not in ("map_error", "pushforward", "trajectories")
    if kind == "trajectories":
        return role == "student"
    if not probe:
        return True
    steps = kind != "gradient_slopes" or isinstance(objective, Consistency)
    rounds = kind != "gradient_rounding" or factors.precision != "float32"
    trained = factors.budget.images != 0 and not isinstance(factors.target, Frozen)
    return role == "student" and trained and steps and rounds


def along(factors: Factors, role: str) -> bool:
    """Whether a run is measured along training: sources, and what is not trained, at their end."""
    trained = factors.budget.images != 0 and not isinstance(factors.objective, FixedPoint)
    return role == "student" and trained


def snapshot_points(
    measure: Measure, asked: Iterable[Settings], factors: Factors, role: str
) -> set[float]:
    """Shares of the budget at which a run keeps a snapshot."""
    return {*(measure.at if along(factors, role) else ()), *(s.at for s in asked), 1.0}


def score_settings(measure: Measure, factors: Factors, ids: Mapping[str, str]) -> Settings | None:
    """The score error of a recipe's estimate: it depends on data, score and teacher alone."""
    ask = measure.score_error
    scored = isinstance(factors.objective, Consistency | Continuous)
    scored &= "score" not in ignored(factors) and not isinstance(factors.score, Own)
    if ask is None or not scored:
        return None
    score = canonical(factors, ids).get("score", difference(factors.score))
    inner = (factors.score, *(getattr(factors.score, s, None) for s in ("inside", "outside")))
    in_batch = endless(factors.data) and any(isinstance(s, KSample) for s in inner)
    return Settings(
        1.0,
        {
            "kind": "score_error",
            "sigmas": ask.sigmas,
            "samples": ask.samples,
            "score": score,
            "data": difference(factors.data),
            "sigma": [factors.sigma.min, factors.sigma.max],
            **({"batch": factors.batch} if in_batch else {}),  # its references are the batch's
            **({"augment": "flip"} if factors.augment == "flip" else {}),  # other x, another law
        },
    )
