"""Networks that all seeds of a study share, whose own variation no interval over seeds holds.

A run of no images is its first weights, and those of a file are the same under every seed. One
measured n times gives n values that differ in sampling alone: they are not n runs, so that a
comparison with it has an interval but no p-value and no verdict. Runs that are trained from such
a network, or taught by it, are n runs, and what their interval lacks is the variation of that
network. Which network it was stands in trained.json, as the digest of the first weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from analysis.load import Cell


def networks(cell: Cell) -> set[str]:
    """The variants and sources of a cell that are untrained and have the same weights under two
    seeds or more. Fixed points have no weights and are none of them."""
    return _repeated(cell.runs[cell.runs.images == 0])


def _repeated(runs: pd.DataFrame) -> set[str]:
    """The names that have the same first weights under two seeds or more."""
    runs = runs[runs.init_digest != ""]
    return set(runs[runs.duplicated(["name", "init_digest"])]["name"])


def below(cell: Cell) -> dict[str, list[str]]:
    """What the other recipes of a cell learn or start from, at any remove, that is one network in
    all seeds: sources by name, and files of weights."""
    recipes, one, alike = cell.recipes, networks(cell), _repeated(cell.runs)
    found: dict[str, list[str]] = {}
    for name in (n for n in recipes if n not in one):
        seen, reached = [name], []
        for current in seen:  # grows as it goes
            recipe = recipes[current]
            read = {k: v for k, v in recipe["factors"].items() if k not in recipe["ignored"]}
            init = read.get("init") or {}
            if init.get("kind") == "weights" and current in alike:
                reached.append(Path(init["weights"]).name)
            new = [n for n in dict.fromkeys(_runs(read)) if n in recipes and n not in seen]
            reached += [n for n in new if n in one]
            seen += [n for n in new if n not in one]
        found[name] = list(dict.fromkeys(reached))
    return found


def _runs(value: object) -> Iterator[str]:
    """The names of runs in factors, wherever they stand."""
    if isinstance(value, dict):
        if isinstance(value.get("run"), str):
            yield value["run"]
        for inner in value.values():
            yield from _runs(inner)


def owed(cell: Cell, names: Iterable[str]) -> str:
    """What a caption owes its reader of variants that are one network or stand on one; "" where
    none does."""
    names, one, stands = list(dict.fromkeys(names)), networks(cell), below(cell)
    alone = ", ".join(n for n in names if n in one)
    text = [f"{alone}: one network in all seeds, whose values differ in sampling alone."] * bool(
        alone)
    for source in dict.fromkeys(s for n in names for s in stands.get(n, ())):
        on = ", ".join(n for n in names if source in stands.get(n, ()))
        text.append(f"{source}, the teacher or first weights of {on}, is shared by all seeds: no "
                    "interval over seeds covers its own variation.")
    return " ".join(text)
