"""What tells measurements apart that are never pooled.

Values of one endpoint with other settings, another extractor or other data behind them have other
identities (see analysis.records): each stands in a row of its own, and says what it stands on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

PATHS = {"teacher": "the teacher's", "second_teacher": "the second teacher's",
         "population": "the population's", "empirical": "the training set's"}


def parts(what: str) -> list[str]:
    """An identity's settings, each as key=value."""
    return re.split(r", (?=\w+=)", what.partition("[")[2][:-1])


def apart(whats: Iterable[str]) -> dict[str, str]:
    """What tells each of these identities from the others, e.g. "data 0a1b2c3d"; "" of one that
    is alone."""
    every = {w: parts(w) for w in dict.fromkeys(whats) if w}
    common = set.intersection(*map(set, every.values())) if every else set()
    return {w: ", ".join(_told(p) for p in own if p not in common) for w, own in every.items()}


def _told(part: str) -> str:
    key, _, value = part.partition("=")
    if key == "data_digest":
        return f"data {value[:8]}"
    return f"{PATHS[value]} path" if key == "along" and value in PATHS else part


def listed(what: str, values: Iterable[object]) -> str:
    """Things by number or name, each once and in order: "seed 0", "seeds 0, 1"."""
    found = sorted(set(values))
    return f"{what}{'s' * (len(found) > 1)} {', '.join(map(str, found))}"


def written(seeds: Iterable[int], differences: Iterable[float]) -> str:
    """The differences by seed in one field of a table: "0:+0.1 1:-0.2"."""
    return " ".join(f"{s}:{x:+.10g}" for s, x in zip(seeds, differences, strict=True))


def points(row: pd.Series) -> dict[int, float]:
    """The same, read from a row."""
    return {int(s): float(x) for s, x in (p.split(":") for p in row["points"].split())}


def standing(row: pd.Series, form: str) -> str:
    """What the values of a comparison or contrast stand on that others at its endpoint do not,
    with its seeds, in a form like ", on {}"; "" where all at the endpoint are alike."""
    seeds = f" ({listed('seed', points(row))})" if row["points"] else ""
    return form.format(row.stands_on + seeds) if row.stands_on else ""
