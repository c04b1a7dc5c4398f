"""The nouns of a study, resolved: Primary, Recipe, Run, Study.

A study asks one question of some variants (compared) and sources (trained for others), in cells
(never pooled) and over seeds. A recipe is a variant or source in one cell, complete; a run is a
recipe with a seed. `resolve.load` makes a Study of a study file before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import msgspec
from msgspec import Meta

from study.errors import StudyError, nearest
from study.factors import Factors
from study.meaning import ignored
from study.metrics import Measure
from study.settings import Settings, applies
from study.values import Share, Value

SECTIONS = {"teacher": "sources", "student": "variants"}  # of a study file, by role


class Primary(Value, frozen=True):
    """The comparison the study was made for, declared before it ran; margin in the transformed
    metric (log for FID)."""

    variant: str
    against: str
    metric: str = "fid"
    nfe: Annotated[int, Meta(ge=1, le=2)] = 1
    at: Share = 1.0
    ema: float | None = None
    reference: str = "train"
    margin: Annotated[float, Meta(ge=0)] = 0.05


@dataclass(frozen=True)
class Recipe:
    """A variant or source in one cell. charge: sources whose images count against its budget;
    seeds: those it is trained with, of the study's."""

    name: str
    role: str  # 'student' for variants, 'teacher' for sources: it keys the randomness
    cell: str
    factors: Factors
    charge: tuple[str, ...]
    seeds: tuple[int, ...]
    measure: Measure

    @property
    def place(self) -> str:
        """Where the study file has it."""
        return f"{SECTIONS[self.role]}.{self.name}"


@dataclass(frozen=True)
class Run:
    """A recipe with a seed. refs: ids of the runs it reads, by factor; charged: ids it pays
    for."""

    recipe: Recipe
    seed: int
    id: str
    refs: Mapping[str, str]
    charged: tuple[str, ...]
    measures: tuple[Settings, ...] = ()

    @property
    def images(self) -> int:
        """How many it trains on: its own budget."""
        return self.recipe.factors.budget.images

    @property
    def reads(self) -> tuple[str, ...]:
        """Ids of all runs that it waits for: those it is trained with and those its measurements
        consult."""
        measured = (i for m in self.measures for i in m.consults)
        return tuple(dict.fromkeys((*self.refs.values(), *measured)))

    @property
    def folder(self) -> str:
        """The folder a new run gets. Only the id at its end is key."""
        cell = f"-{self.recipe.cell}" if self.recipe.role == "student" else ""
        return f"{self.recipe.name}{cell}-s{self.seed}-{self.id}"


@dataclass(frozen=True)
class Study:
    """A resolved study; runs stand after the runs that they read."""

    name: str
    question: str
    primaries: Mapping[str, Primary]  # by cell
    seeds: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    runs: tuple[Run, ...]
    compare: tuple[tuple[str, str], ...] = ()  # (variant, baseline) beside the primary

    @cached_property
    def unique(self) -> dict[str, Run]:
        """Runs by id: names that mean the same are one. A later name's measures are added."""
        result: dict[str, Run] = {}
        for run in self.runs:
            old = result.get(run.id)
            if old:
                more = tuple(m for m in run.measures if m not in old.measures)
                run = replace(old, measures=old.measures + more)
            result[run.id] = run
        return result

    def as_json(self) -> dict:
        """What study.json holds: plain data for the analysis."""
        index = {id(recipe): i for i, recipe in enumerate(self.recipes)}
        return {
            "schema": 1,
            "name": self.name,
            "question": self.question,
            "primary": {c: msgspec.to_builtins(p) for c, p in self.primaries.items()},
            "compare": self.compare,
            "seeds": self.seeds,
            "cells": list(dict.fromkeys(r.cell for r in self.recipes)),
            "recipes": [
                {
                    "name": r.name,
                    "role": "variant" if r.role == "student" else "source",
                    "cell": r.cell,
                    "factors": msgspec.to_builtins(r.factors),
                    "charge": r.charge,
                    "ignored": ignored(r.factors),
                }
                for r in self.recipes
            ],
            "runs": [
                {
                    "recipe": index[id(r.recipe)],
                    "seed": r.seed,
                    "id": r.id,
                    "folder": r.folder,
                    "refs": sorted(set(r.refs.values())),
                    "charged": r.charged,
                    "measures": [m.file for m in r.measures],
                }
                for r in self.runs
            ],
        }


def meant(key: str, keys: Iterable[str]) -> str:
    """What a word that is none of a study file's keys was meant for: it may be a key of one."""
    below = {"base": Factors, "measure": Measure, "primary": Primary}
    inside = (f"{at}.{key}" for at, kind in below.items() if key in kind.__struct_fields__)
    return next((f"did you mean {path!r}?" for path in inside), nearest(key, keys))


def compared(given: object, where: str, recipes: Sequence[Recipe]) -> tuple[tuple[str, str], ...]:
    """The further comparisons that a study was made for, as (variant, baseline) pairs.

    Raises StudyError unless each is of two different known variants that share a seed, named once.
    """
    try:
        pairs = msgspec.convert(() if given is None else given, tuple[tuple[str, str], ...])
    except msgspec.ValidationError as error:
        raise StudyError(
            f"{where}: {given!r} given; a list of [variant, baseline] pairs expected ({error})"
        ) from None
    seeds = {r.name: set(r.seeds) for r in recipes if r.role == "student"}
    for i, pair in enumerate(pairs):
        for name in pair:
            if name not in seeds:
                raise StudyError(f"{where}.{i}: no variant {name!r}; {nearest(name, seeds)}")
        if pair[0] == pair[1]:
            raise StudyError(f"{where}.{i}: {pair[0]!r} twice; two different variants expected")
        if not seeds[pair[0]] & seeds[pair[1]]:
            raise StudyError(f"{where}.{i}: {pair[0]!r} and {pair[1]!r} share no seed")
        if set(pair) in map(set, pairs[:i]):
            raise StudyError(f"{where}.{i}: {list(pair)} is named twice")
    return pairs


def check_rounding(recipes: Sequence[Recipe], file: str) -> None:
    """What half precision does is asked of a study in which it does something, else StudyError."""
    asked = [r for r in recipes if r.measure.gradient_rounding]
    if asked and not any(applies("gradient_rounding", r.factors, r.role) for r in asked):
        raise StudyError(
            f"{file}: measure.gradient_rounding: no variant trains in half precision (toward a "
            "target that is not frozen); give one precision: float16, or drop the key"
        )
