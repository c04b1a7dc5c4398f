"""What is measured, as data: the study file's `measure` and the settings record of each number.

A measurement is one number or curve from one snapshot under one settings record, kept in the file
measures/PROGRESS-KIND-DIGEST.json whose digest is over the record: unlike settings never share a
file. Variants are measured along training, sources at their end only; a denoising source with a
35-NFE Heun sampler (Karras et al. 2022), a consistency model with one and two steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from study.errors import StudyError, nearest
from study.factors import (
    Consistency,
    Denoising,
    Factors,
    Frozen,
    Positive,
    Share,
    Value,
)
from study.identity import canonical, difference, digest

HEUN_NFE = 35
EXTRACTORS = Path(__file__).with_name("extractors")
Points = Annotated[tuple[Share, ...], Meta(min_length=1)]
Steps = Annotated[tuple[Annotated[int, Meta(ge=1, le=2)], ...], Meta(min_length=1)]
Lengths = Annotated[tuple[float, ...], Meta(min_length=1)]


Levels = Annotated[int, Meta(ge=2, le=1000)]
Draws = Annotated[int, Meta(ge=1, le=100)]
Samples = Annotated[int, Meta(ge=8, le=1_000_000)]


class Fid(Value, frozen=True):
    """Frechet distance in the features of a named extractor, mean over sampling draws."""

    extractor: str
    samples: Samples
    nfe: Steps = (1, 2)
    mid: Positive = 0.821  # noise level of the second step (ECT's for CIFAR-10)
    draws: Draws = 3
    ema: Lengths | None = None  # null: the first of weights_ema
    at: Points | None = None


class Kid(Value, frozen=True):
    """Kernel distance (unbiased, may be negative), one subset of all n; null: as in `fid`."""

    extractor: str | None = None
    samples: Samples | None = None
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


class Measure(Value, frozen=True):
    """What a study measures, and at which shares of each run's budget."""

    at: Points = (0.25, 0.5, 1.0)
    fid: Fid | None = None
    kid: Kid | None = None
    sliced_wasserstein: SlicedWasserstein | None = None
    mode_mass: ModeMass | None = None
    map_error: MapError | None = None
    score_error: ScoreError | None = None


@dataclass(frozen=True)
class Settings:
    """One measurement asked of a run: its progress and its settings record."""

    at: float
    record: Mapping[str, Any]

    @property
    def file(self) -> str:
        """Its name in the run's folder measures/."""
        return f"{self.at:.3f}-{self.record['kind']}-{digest(self.record, 8)}.json"


@cache
def extractor_identity(name: str, where: str = "extractor") -> str:
    """NAME:DIGEST of a shipped extractor's weights. Raises StudyError for an unknown name."""
    path = EXTRACTORS / f"{name}.pt"
    known = [p.stem for p in EXTRACTORS.glob("*.pt")]
    if name not in known:
        raise StudyError(f"{where}: {name!r}; {nearest(name, known)}")
    return f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def settings_of(measure: Measure, factors: Factors, role: str) -> Iterator[Settings]:
    """Every measurement of this recipe's own snapshots."""
    denoising = isinstance(factors.objective, Denoising)
    for kind in ("fid", "kid", "sliced_wasserstein", "mode_mass", "map_error"):
        ask = getattr(measure, kind)
        if ask is None or (kind == "map_error" and denoising):
            continue
        plain = {f: getattr(ask, f) for f in ask.__struct_fields__}
        if kind == "kid" and measure.fid:
            plain = {f: getattr(measure.fid, f) if v is None else v for f, v in plain.items()}
        points = plain.pop("at") or measure.at
        asked = plain.pop("ema")  # of variants; of a source, the weights that others read
        lengths = asked if asked and role == "student" else factors.weights_ema[:1]
        steps = plain.pop("nfe", (1,))
        steps = (HEUN_NFE,) if denoising else steps
        if "extractor" in plain:
            plain["extractor"] = extractor_identity(plain["extractor"])
        for at in points if role == "student" else (1.0,):
            for ema in lengths:
                if kind == "map_error":
                    yield Settings(at, {"kind": kind, "ema": ema, **plain})
                    continue
                for nfe in steps:
                    record = {"kind": kind, "ema": ema, "nfe": nfe, **plain}
                    record["mid"] = plain["mid"] if nfe == 2 else None
                    for reference in ("train", "held_out") if "extractor" in plain else (None,):
                        yield Settings(
                            at, record | ({"reference": reference} if reference else {})
                        )


def snapshot_points(measure: Measure, asked: Iterable[Settings], role: str) -> set[float]:
    """Shares of the budget at which a run keeps a snapshot: sources only at their end."""
    return {*(measure.at if role == "student" else ()), *(s.at for s in asked), 1.0}


def score_settings(measure: Measure, factors: Factors, ids: Mapping[str, str]) -> Settings | None:
    """The score error of a recipe's estimate: it depends on data, score and teacher alone."""
    ask = measure.score_error
    scored = isinstance(factors.objective, Consistency) and not isinstance(factors.target, Frozen)
    if ask is None or not scored:
        return None
    score = canonical(factors, ids).get("score", difference(factors.score))
    return Settings(
        1.0,
        {
            "kind": "score_error",
            "sigmas": ask.sigmas,
            "samples": ask.samples,
            "score": score,
            "data": difference(factors.data),
            "sigma": [factors.sigma.min, factors.sigma.max],
        },
    )
