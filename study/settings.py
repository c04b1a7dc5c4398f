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
from typing import Any

import msgspec
from msgspec import Struct

from study.extractors.names import extractor_identity
from study.factors import (
    Consistency,
    Continuous,
    Denoising,
    Factors,
    FixedPoint,
    Frozen,
    KSample,
    Own,
)
from study.identity import canonical, difference, digest
from study.meaning import endless, estimates, ignored, updated
from study.metrics import Measure

HEUN_NFE = 35
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
                if kind == "trajectories" and factors.augment == "flip":
                    record["augment"] = "flip"  # an untrained run's id does not hold it
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
    trained = updated(factors) and not isinstance(factors.target, Frozen)
    return role == "student" and trained and steps and rounds


def along(factors: Factors, role: str) -> bool:
    """Whether a run is measured along training: sources, and what is not trained, at their end."""
    return role == "student" and updated(factors)


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
    drawn = any(isinstance(s, KSample) for s in estimates(factors.score))
    in_batch = drawn and endless(factors.data)
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
