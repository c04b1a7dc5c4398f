"""The ledger: what every run cost, and what is unequal where it should be equal.

"Matched" means that this ledger proves it: own + charged images are equal within a block. Passes,
FLOPs and seconds are columns beside it, with and without the sources that a run stands on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import shared
from analysis.load import Cell, Study
from analysis.recipes import kind_of
from study.errors import listed, several

# column, its name in a sentence, the factors that must be alike for it to have to be equal
CHECKS = (("images_total", "own + charged images", ()), ("data_digest", "the data", ()),
          ("stream_digest", "the images, noise and u drawn", ("data_stream", "batch", "augment")),
          ("init_digest", "the random initial weights", ("network",)),
          ("parameters", "the numbers of parameters", ("network",)))
ENVIRONMENT = (("code", "digests of the code"), ("commit", "commits"),
               ("device", "kinds of device"), ("torch", "versions of torch"),
               ("python", "versions of Python"))
SPEND = ("images", "charged_images", "images_total", "images_with_sources", "passes",
         "passes_with_sources", "flops", "flops_with_sources", "seconds", "seconds_with_sources",
         "parameters")
# what the answer itself has to tell of, beside the captions
ANSWERED = ("data", "halves", "code", "commit", "device", "torch", "python", "dirty")


@dataclass(frozen=True)
class Mismatch:
    """Something unequal that should be equal. cell: "" if it concerns the whole study."""

    what: str
    cell: str
    sentence: str


def spend(study: Study) -> pd.DataFrame:
    """Mean spend per trained run: a row per cell, role and name, own and with sources."""
    groups = study.runs[study.runs.outcome == "trained"].groupby(["cell", "role", "name"],
                                                                 sort=False)
    table = groups[list(SPEND)].mean()
    table.insert(0, "runs", groups.size())
    return table.reset_index()


def audit(study: Study) -> list[Mismatch]:
    """What is unequal within a block, or over the study, where it should be equal. Fixed points,
    which are computed at no cost, take no part.

    Within a block, among variants: own + charged images; the data's digest; the digest of images,
    noise and u among runs of one side (student or teacher), data_stream, batch and augment; the
    initial weights of randomly initialised runs of one network; the parameters of one network.
    Over a cell: the data of its seeds. Over the study: commit, device, torch, Python, and whether
    the checkout was clean.
    """
    within = [m for cell in study.cells for m in _within(cell)]
    data = [m for cell in study.cells for m in _data(cell)]
    strays = [Mismatch("inputs", "", f"{folder}: its source is not the one it learned from: the "
                       "source was trained again since.") for folder in study.strays]
    files = [Mismatch("inputs", "", f"Runs began with different files called {name}: "
                      + " against ".join(f"{digest[:8]} ({several(len(folders), 'run')})"
                                         for digest, folders in digests.items()) + ".")
             for name, digests in study.files.items() if len(digests) > 1]
    halves = [Mismatch("halves", "", f"{folder}: two halves of one run, of different trainings: "
                       f"{why}.") for folder, why in study.halves.items()]
    seed_of = dict(zip(study.runs["id"], study.runs.seed, strict=True))
    return within + data + strays + halves + files + _over_study(study.attempts, seed_of)


def _within(cell: Cell) -> list[Mismatch]:
    """What is unequal within a block, one for all seeds in which it is the same."""
    runs = cell.runs[(cell.runs.role == "variant") & (cell.runs.outcome == "trained")
                     & (cell.runs.same_as == "") & (cell.runs.objective != "fixed_point")]
    found: dict[tuple[str, str], list[int]] = {}
    for seed, block in runs.groupby("seed", sort=False):
        for column, label, alike in CHECKS:
            groups: dict[str, dict[Any, list[str]]] = {}
            for name, side, value in block[["name", "side", column]].itertuples(index=False):
                f = cell.recipes[name]["factors"]
                random = kind_of(f, "init") == "random"
                if value in ("", None) or value != value or (
                        column == "init_digest" and not random):
                    continue
                key = json.dumps([side if alike else "", *(f.get(k) for k in alike)],
                                 sort_keys=True)
                groups.setdefault(key, {}).setdefault(value, []).append(name)
            for parts in groups.values():
                if len(parts) > 1:
                    text = f"{label} differ: {_parts(parts)}"
                    found.setdefault((column, text), []).append(seed)
    return [Mismatch(column, cell.name, f"{cell.name}, {listed('seed', seeds)}: {text}.")
            for (column, text), seeds in found.items()]


def _data(cell: Cell) -> list[Mismatch]:
    """Whether the seeds of a cell do not all stand on the same data."""
    rows = cell.runs[(cell.runs.objective != "fixed_point") & (cell.runs.data_digest != "")]
    seeds = rows.groupby("data_digest", sort=False)["seed"].agg(lambda s: tuple(sorted(set(s))))
    if len(set(seeds)) <= 1:
        return []
    each = "; ".join(f"{listed('seed', s)}: {digest[:8]}" for digest, s in seeds.items())
    return [Mismatch("data", cell.name, f"{cell.name}: {listed('seed', rows.seed)} stand on "
                     f"different data (digests of {each}). Values on different data are never "
                     "pooled: each row and sentence says on which it stands, a figure or contrast "
                     "shows those that most runs have.")]


def _parts(parts: dict[Any, list[str]]) -> str:
    """The values with the names that have them; of digests only who agrees with whom."""
    if all(isinstance(v, float) for v in parts):
        return "; ".join(f"{v:,.0f} for {', '.join(names)}" for v, names in parts.items())
    return " against ".join(", ".join(names) for names in parts.values())


def _over_study(starts: pd.DataFrame, seed_of: Mapping[str, int]) -> list[Mismatch]:
    found = []
    known = starts["code"].notna().all()  # then commits may differ in what is not code
    for column, label in ENVIRONMENT:
        if column == ("commit" if known else "code"):
            continue
        counts = environment(starts, column)
        if len(counts) > 1:
            seeds = {v: listed("seed", (seed_of[i] for i in ids)) for v, ids in
                     starts.groupby(_values(starts, column))["id"]}
            told = len(set(seeds.values())) > 1  # else each seed has them all
            each = ", ".join(f"{v} ({several(n, 'run')}{f' of {seeds[v]}' * told})"
                             for v, n in counts.items())
            found.append(Mismatch(column, "", f"The runs stand on {len(counts)} {label}: {each}; "
                                  "a resumed run can stand on several."))
    dirty = starts[starts["dirty"].eq(True)]["id"].nunique()
    if dirty:
        were = "was" if dirty == 1 else "were"
        found.append(Mismatch("dirty", "", f"{several(dirty, 'run')} {were} started from a "
                              "checkout with uncommitted changes."))
    return found


def environment(starts: pd.DataFrame, column: str) -> dict[str, int]:
    """How many runs were started under each value of a provenance column."""
    return starts.groupby(_values(starts, column))["id"].nunique().to_dict()


def _values(starts: pd.DataFrame, column: str) -> pd.Series:
    values = starts[column].fillna("unknown").astype(str)
    return values.str[:12] if column == "commit" else values


def standing(cell: Cell, mismatches: Iterable[Mismatch], ids: Iterable[str] | None) -> str:
    """What a caption owes its reader: how many planned runs it stands on and what network these
    share over seeds (neither if ids is None), and what is unequal, uncommitted changes left out:
    these stand under the answer.
    """
    rows = cell.runs[cell.runs.role == "variant"]
    fixed = rows[rows.objective == "fixed_point"]["id"]
    if ids is not None and not fixed.isin(ids := list(ids)).any():
        rows = rows[rows.objective != "fixed_point"]
    planned = set(rows["id"])
    diverged = rows[rows.outcome == "diverged"]["id"].nunique()
    text = ""
    if ids is not None:
        text = f"Stands on {len(planned & set(ids))} of {len(planned)} planned runs of {cell.name}"
        text += f" ({diverged} diverged and left out)." if diverged else "."
        names = rows[rows["id"].isin(set(ids)) & (rows.same_as == "")]["name"]
        text = f"{text} {shared.owed(cell, names)}".rstrip()
    shown = [m.sentence for m in mismatches if m.cell in ("", cell.name) and m.what != "dirty"]
    more = f" And {len(shown) - 3} more in the ledger audit." if len(shown) > 3 else ""
    return text + (f" It stands on a mismatch: {' '.join(shown[:3])}{more}" if shown else "")
