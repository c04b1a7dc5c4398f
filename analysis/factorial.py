"""The 2 x 2 of {mean} x {noise}: CT's two differences from CD, each alone, and their interplay.

Corners are variants of a cell that are equal in all but the score: the teacher X (its mean, no
noise), the blend (0, 1) with the run X (its mean, CT's noise), the exact posterior mean (no noise)
and the single sample (that mean, CT's noise). With g the transformed metric (ln for FID), e and t
the exact and the teacher's mean, n and o with noise and without, per block:

    mean         ((g_eo - g_to) + (g_en - g_tn)) / 2
    noise        ((g_tn - g_to) + (g_en - g_eo)) / 2
    interaction  (g_en - g_eo) - (g_tn - g_to)

so that CT minus CD is the sum of the first two. Above 0 is worse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import shared, stats, tables, words
from analysis.document import Block, Section, Table
from analysis.identities import apart, standing, written
from analysis.load import Cell, Study
from analysis.recipes import computed, differing, endless
from study.errors import several

WEIGHTS = {"mean": (-0.5, -0.5, 0.5, 0.5), "noise": (-0.5, 0.5, -0.5, 0.5),
           "interaction": (1.0, -1.0, -1.0, 1.0)}  # of the corners in the order of Corners
COLUMNS = ("cell", "contrast", "teacher", "noisy", "exact", "single", *tables.ENDPOINT, "n",
           "effect", "low", "high", "percent", "percent_low", "percent_high", "sd", "p", "points",
           "stands_on")


class Corners(NamedTuple):
    """Names of variants: the teacher's mean without noise and with it, the exact mean likewise."""

    teacher: str
    noisy: str
    exact: str
    single: str


def contrasts(g: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The contrasts of each block, from g of shape (blocks, 4) in the order of Corners."""
    return {name: g @ np.array(weights) for name, weights in WEIGHTS.items()}


def corners(cell: Cell) -> list[Corners]:
    """Every complete 2 x 2 of a cell."""
    recipes = cell.recipes
    trained = [n for n in tables.variants(cell) if not computed(recipes[n]) and "score" not in
               recipes[n]["ignored"]]
    found = []
    for first in trained:
        run = _score(recipes[first]).get("run")
        if _score(recipes[first]).get("kind") != "teacher":
            continue
        exact = "analytic" if endless(recipes[first]) else "empirical"
        alike = [n for n in trained if differing(recipes, n, first) == ("score",)]
        sides = [next((n for n in alike if _is(_score(recipes[n]), kind, run)), "")
                 for kind in ("blend", exact, "single_sample")]
        if all(sides):
            found.append(Corners(first, *sides))
    return found


def _score(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["factors"].get("score") or {}


def _is(score: dict[str, Any], kind: str, run: str | None) -> bool:
    """Whether a score is of this kind; a blend: the mean of this run with CT's own noise."""
    return score.get("kind") == kind and (kind != "blend" or (
        (score.get("alpha"), score.get("beta"), score.get("run")) == (0, 1, run)
        and score.get("residual", "posterior") == "posterior"))


def effects(study: Study) -> pd.DataFrame:
    """The contrasts of every 2 x 2 at its cell's endpoint: COLUMNS, a row each."""
    rows: list[dict[str, Any]] = []
    for cell in study.cells:
        endpoint = tables.shown_endpoint(cell)
        for square in corners(cell) if endpoint else ():
            seeds, g, on = _blocks(cell, endpoint, square)
            log = stats.is_log(endpoint["metric"])
            for name, values in contrasts(g).items():
                rows.append(endpoint | square._asdict() | stats.paired(values).columns(log) | {
                    "cell": cell.name, "contrast": name, "stands_on": on,
                    "points": written(seeds, values)})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _blocks(cell: Cell, endpoint: dict[str, Any], square: Corners
            ) -> tuple[list[int], NDArray[np.float64], str]:
    """The seeds that all four corners have, their transformed values (seeds, 4), and what these
    stand on where there are others, which fewer seeds have."""
    rows = tables.select(cell.measures, endpoint)
    rows = cell.lasting(rows[rows.name.isin(square)])
    best: tuple[list[int], NDArray[np.float64], str] = ([], np.empty((0, 4)), "")
    on = apart(rows.identity)
    for what, group in rows.groupby("identity", sort=False):  # only equal identities are compared
        wide = group.pivot(index="seed", columns="name", values="value")
        wide = wide.reindex(columns=list(square)).sort_index()
        g = stats.transform(endpoint["metric"], wide.to_numpy(dtype=float, copy=True))
        whole = np.isfinite(g).all(axis=1)
        if whole.sum() > len(best[0]):
            best = wide.index[whole].tolist(), g[whole], on[str(what)]
    return best


def sentences(study: Study, frame: pd.DataFrame) -> list[str]:
    """One sentence for each contrast that has a block."""
    told = []
    for _, row in frame[frame.n > 0].iterrows():
        where = study.of(row.cell).prefix + standing(row, "on {}, ")
        log, name = stats.is_log(row.metric), tables.title(row.metric, row.nfe)
        by = words.change(row.effect, log)
        changes = {
            "mean": f"the exact mean instead of the teacher's changes the {name} by "
                    f"{by}, averaged over noise",
            "noise": f"CT's noise changes the {name} by {by}, averaged over means",
            "interaction": f"interaction: the noise's effect on the {name} with the exact mean "
                           f"differs from that with the teacher's by {by}"}
        span = (f"95 % interval {words.interval(row.low, row.high, log)}, "
                if row.n >= stats.INTERVAL_FROM else "")
        null = "; the interval includes no difference (0)" if row.low <= 0 <= row.high else ""
        told.append(f"{where}{changes[row.contrast]} "
                    f"({span}{several(row.n, 'seed')}){null}.")
    return told


def section(study: Study, frame: pd.DataFrame) -> list[Section]:
    """The table of the 2 x 2, where a cell has one."""
    if frame.empty:
        return []
    labels = {"mean": "exact mean − teacher's mean", "noise": "CT's noise − none",
              "interaction": "noise's effect with the exact mean − with the teacher's"}
    body = []
    for _, row in frame.iterrows():
        log = stats.is_log(row.metric)
        body.append((row.cell + standing(row, ", on {}"),
                     f"{row.contrast}: {labels[row.contrast]}",
                     f"{row.teacher}, {row.noisy}; {row.exact}, {row.single}",
                     words.change(row.effect, log) if row.n else "–",
                     words.interval(row.low, row.high, log), str(row.n)))
    cells = [study.of(name) for name in frame.cell.unique()]
    notes = [f" {text}" for cell in cells if (text := shared.owed(cell, np.unique(
        frame[frame.cell == cell.name][list(Corners._fields)])))]
    points = dict.fromkeys(tables.described(tables.shown_endpoint(cell)) for cell in cells)
    block: Block = Table(
        ("cell", "effect of", "teacher's mean, plain and noisy; exact mean, plain and noisy",
         "effect", "95 % t interval", "seeds"), body,
        f"{'; '.join(points)}. Paired contrasts per block over the seeds that all four corners "
        "have: the effect of the mean averaged over noise, that of the noise averaged over means, "
        "and the interaction, by how much the noise's effect is larger with the exact mean. "
        + ("On the logarithm, shown as percent of a ratio. " if all(
            stats.is_log(m) for m in frame.metric) else "")
        + "The single sample minus the teacher is the sum of the first two"
        + (" (their ratios multiply)" if all(stats.is_log(m) for m in frame.metric) else "")
        + ". Above 0 is worse. Described, not tested." + "".join(notes))
    return [Section("Mean and noise", (block,))]
