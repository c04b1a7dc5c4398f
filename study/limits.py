"""How large a study may be: what a plan of it, or its data, would take of memory and time.

A few letters of a study file can ask for anything; beyond these limits they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from study.domains import CHANNELS, SIDE
from study.errors import StudyError
from study.settings import settings_of
from study.spec import Recipe
from study.subjects import FittedMixture, Mixture

MOST_RUNS = 20_000
MOST_MEASUREMENTS = 1_000_000
MOST_NUMBERS = 2**28  # of a sample that is drawn once: 1 GiB
MOST_ABOVE = 100  # variants by `from`, or sources of sources


def check_runs(recipes: int, seeds: Sequence[int], file: str) -> None:
    """A study has no more runs than a plan can hold, else StudyError."""
    if recipes * len(seeds) > MOST_RUNS:
        raise StudyError(
            f"{file}: {recipes} variants and sources over all cells, times {len(seeds)} seeds, "
            f"come to {recipes * len(seeds)} runs; allowed: {MOST_RUNS}"
        )


def check_measurements(recipes: Sequence[Recipe], file: str) -> None:
    """Nor is more measured, else StudyError."""
    asked = 0
    for recipe in recipes:
        for _ in settings_of(recipe.measure, recipe.factors, recipe.role):
            asked += len(recipe.seeds)
            if asked > MOST_MEASUREMENTS:
                raise StudyError(f"{file}: measure: asks for over {MOST_MEASUREMENTS} numbers; "
                                 "give fewer of at, nfe, ema, or fewer runs")  # fmt: skip


def check_sample(data: Mixture | FittedMixture, where: str) -> None:
    """What is drawn once and kept fits into memory, else StudyError."""
    of = data.of.__struct_config__.tag if isinstance(data, FittedMixture) else None
    size = CHANNELS[of] * SIDE[of] ** 2 if of else len(data.means[0])
    for key in ("samples", "held_out"):
        count = getattr(data, key) or 0
        if count * size > MOST_NUMBERS:
            raise StudyError(f"{where}: data.{key}: {count} of {size} numbers each; allowed: "
                             f"{MOST_NUMBERS // size}")  # fmt: skip
