"""Which data finished runs stand on.

A study names its data and does not hold them: images in a folder may change between two trainings.
A run's trained.json has a digest of what it learned from. Within one cell, runs of one data factor
with unlike digests are neither paired nor pooled by the report; what is trained for it is told
beforehand, and within one block it is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from study.errors import StudyError, listed, several
from study.factors import FixedPoint
from study.progress import MANY_SEEDS, label, outcomes
from study.spec import Run
from study.store import LEFT, Store
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


def check_blocks(
    store: Store, wanted: Iterable[Run], now: Mapping[Data, str], retry: bool
) -> list[str]:
    """Lines that name the finished runs on other data than are there now; now: digests of data
    that may change. Raises StudyError where one of `wanted` would be trained into their block."""
    study, folders = store.study, store.folders
    old = {r.id: r for r in study.unique.values() if (trained := folders[r.id].trained)
           and trained["data_digest"] != now.get(r.recipe.factors.data, trained["data_digest"])}
    states = outcomes(store, store.states(wanted), retry)
    ready = {*LEFT, "failed"} if retry else LEFT
    new = {i for i, s in states.items() if s in ready and folders[i].trained is None}

    def block(run: Run) -> tuple[str, int, Data]:
        return run.recipe.cell, run.seed, run.recipe.factors.data

    mixed = {block(r) for r in study.runs if r.id in old}
    mixed &= {block(r) for r in study.runs if r.id in new}
    if mixed:
        inside = [r for r in study.unique.values() if block(r) in mixed]
        kept, more = (_few(r for r in inside if r.id in ids) for ids in (old, new))
        roots = ", ".join(sorted({data.root or "its default place" for *_, data in mixed}))
        raise StudyError(
            f"{study.name}: data.root: {roots}: not the data that {kept} learned from, and {more} "
            "would be trained on them in the same block; bring the old data back, or name another "
            "folder for what is trained on these: --results DIR"
        )
    return [f"on other data than are there now: {_few(old.values())}"] if old else []


def _few(runs: Iterable[Run]) -> str:
    names = [label(run) for run in runs]
    rest = f" and {len(names) - MANY_SEEDS} more"
    return ", ".join(names[:MANY_SEEDS]) + rest * (len(names) > MANY_SEEDS)


def _named(seeds: Collection[int]) -> str:
    many = len(seeds) > MANY_SEEDS
    return several(len(seeds), "seed") if many else listed("seed", seeds)
