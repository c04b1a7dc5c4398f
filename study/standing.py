"""Which data finished runs stand on.

A study names its data and does not hold them: images in a folder may change between two trainings.
A run's trained.json has a digest of what it learned from. Within one cell, runs of one data factor
with unlike digests are neither paired nor pooled by the report; what is trained for it is told
beforehand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from study.errors import listed, several
from study.factors import FixedPoint
from study.progress import MANY_SEEDS
from study.store import Store
from study.subjects import Data

if TYPE_CHECKING:  # --plan and --status do without it
    import numpy as np


def digest(*parts: np.ndarray) -> str:
    """SHA-256 of the parts' shapes and values, 16 hex digits: what is trained on and held out."""
    total = hashlib.sha256()
    for x in parts:
        total.update(str(tuple(x.shape)).encode() + x.tobytes())
    return total.hexdigest()[:16]


def finished(store: Store) -> dict[tuple[str, Data], dict[str, set[int]]]:
    """By cell and data: the seeds of finished runs by the digest of what they learned from."""
    found: dict[tuple[str, Data], dict[str, set[int]]] = {}
    for run in store.study.unique.values():
        factors, trained = run.recipe.factors, store.folders[run.id].trained
        if trained and not isinstance(factors.objective, FixedPoint):  # made of the density
            cell = found.setdefault((run.recipe.cell, factors.data), {})
            cell.setdefault(trained["data_digest"], set()).add(run.seed)
    return found


def unlike(store: Store, now: Mapping[Data, str] | None = None) -> list[str]:
    """A line for each cell whose finished runs learned from other data than each other, or than
    the data are now; now: digests, where they are known."""
    lines = []
    for (cell, data), seeds in finished(store).items():
        current = (now or {}).get(data)
        if len(seeds.keys() | ({current} if current else set())) < 2:
            continue
        each = ", ".join(f"{_named(s)} learned from data {d[:8]}" for d, s in seeds.items())
        then = f"; the data are now {current[:8]}" if current else ""
        lines.append(f"{cell}: {each}{then}: seeds on different data are not pooled")
    return lines


def _named(seeds: Collection[int]) -> str:
    many = len(seeds) > MANY_SEEDS
    return several(len(seeds), "seed") if many else listed("seed", seeds)
