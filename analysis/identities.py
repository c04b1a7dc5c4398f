"""What tells measurements apart that are never pooled.

Values of one endpoint with other settings, another extractor or other data behind them have other
identities (see analysis.records): each stands in a row of its own, and says what it stands on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from study.errors import listed

PATHS = {"teacher": "the teacher's", "second_teacher": "the second teacher's",
         "population": "the population's", "empirical": "the training set's"}


def settings(what: str) -> dict[str, str]:
    """An identity's settings as text, by key. Lists hold commas too, which no key follows."""
    inner = what[what.index("[") + 1:-1]
    return dict(part.split("=", 1) for part in re.split(r", (?=\w+=)", inner) if part)


def apart(whats: Iterable[str]) -> dict[str, str]:
    """What tells each of these identities from the others, e.g. "data 0a1b2c3d", or "no mid" of
    one that lacks a setting; "" of one that is alone."""
    own = {w: settings(w) for w in dict.fromkeys(whats) if w}
    keys = [k for k in dict.fromkeys(k for s in own.values() for k in s)
            if len({s.get(k) for s in own.values()}) > 1]
    return {w: ", ".join(_told(k, s.get(k)) for k in keys) for w, s in own.items()}


def _told(key: str, value: str | None) -> str:
    if value is None:
        return f"no {key}"
    if key == "data_digest":
        return f"data {value[:8]}"
    return f"{PATHS[value]} path" if key == "along" and value in PATHS else f"{key}={value}"


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
