"""What the figures of instruments share: the rows to draw, means over seeds, and what to say.

A mean over seeds is drawn with a bar of one standard error, the larger of two: from the noise of
each run's measurement, and from the spread over seeds. Bands go from the smallest seed to the
largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import shared, tables
from analysis.identities import apart
from analysis.load import Cell, Study
from analysis.style import GREY, STAR, Look, look

SIGMA = r"noise level $t$"
OWN = ("Probes are taken at each variant's own weights, so that variants differ in where they are "
       "measured too. The law's values are not the mean of the levels': mean gradients of "
       "different levels can cancel, and the law's variance holds the spread between levels.")
ROUNDS = 0.1  # of a batch's noise: what is rounded in the same way in every batch adds up
RATIO = "rho is a ratio of unbiased estimates and can leave [0, 1] by chance."
ERROR = "± one standard error (the larger of the measurement's own and that over seeds)"
BARS = ("Means over seeds; bars are one standard error (the larger of the measurement's own and "
        "that over seeds), bands go from the smallest to the largest seed.")


def rows_of(cell: Cell, kind: str, last: bool = True) -> pd.DataFrame:
    """The values of one kind that a cell's variants have, those of diverged runs left out; last:
    at the last point only. Of several averages of the weights the first, of several settings those
    that most files have."""
    rows = cell.instruments
    rows = cell.lasting(rows[(rows.kind == kind) & rows.name.isin(tables.variants(cell))])
    rows = rows[rows.ema.isin(rows.ema.iloc[:1])]
    if last and len(rows):
        rows = rows[rows["at"] == rows["at"].max()]
    return rows[rows.identity.isin(rows.identity.mode().iloc[:1])]


def planned(cell: Cell, kind: str) -> bool:
    """Whether a cell's study asks for a measurement of this kind."""
    return any(frame.file.str.contains(f"-{kind}-", regex=False).any()
               for frame in (cell.missing, cell.measures))


def lacking(study: Study, kind: str) -> bool:
    """Whether a measurement of this kind is asked for and not there."""
    return bool(study.missing.file.str.contains(f"-{kind}-", regex=False).any())


def yet(study: Study) -> str:
    """" yet" where something that is asked for is not there."""
    return " yet" * (not study.missing.empty)


def points(study: Study) -> set[float]:
    """The shares of the budget at which anything is, or is to be, measured."""
    later = study.missing.file.str.split("-").str[0].astype(float)
    return {round(float(p), 3) for p in (*study.measures["at"], *later)}


def stands_on(cell: Cell, rows: pd.DataFrame) -> str:
    """How many of the files asked for a figure or table of these rows, of one kind, stands
    on, and at which points."""
    kind, points = rows.kind.iloc[0], rows["at"].unique()
    lacking = cell.missing[cell.missing.file.str.contains(f"-{kind}-", regex=False)]
    at = lacking.file.str.split("-").str[0].astype(float).round(3)
    lacking = lacking[at.isin(np.round(points, 3))].drop_duplicates(["id", "file"])
    measured, why = rows["file"].nunique(), lacking.why.value_counts()
    text = f"Stands on {measured} of {measured + len(lacking)} planned files"
    text += f" ({', '.join(f'{n} {w}' for w, n in why.items())})" if len(why) else ""
    every = cell.instruments[cell.instruments.kind == kind]
    told = (apart(every.identity)[w] for w in rows.identity.unique())
    data = dict.fromkeys(p for t in told for p in t.split(", ") if p.startswith("data "))
    text += f", on {' and '.join(data)} alone" * bool(data)
    text += f", at {', '.join(f'{100 * p:g} %' for p in sorted(points))} of the budget. "
    return (text + shared.owed(cell, rows.name)).rstrip()


def over_seeds(rows: pd.DataFrame, by: str = "level") -> pd.DataFrame:
    """mean, se, low, high and n over runs, by level; what is nan counts as not measured."""
    rows = rows[rows["value"].notna()]
    rows = rows.assign(square=rows["se"] ** 2)
    groups = rows.groupby(by)
    frame = groups["value"].agg(mean="mean", low="min", high="max", n="count")
    within = np.sqrt(groups["square"].agg(lambda x: x.sum(skipna=False))) / frame["n"]
    return frame.assign(se=np.fmax(within, groups["value"].std() / np.sqrt(frame["n"])))


def one(rows: pd.DataFrame) -> dict[str, float]:
    """The same of a single number per run: mean, se, low, high, n; nan and 0 for no rows."""
    frame = over_seeds(rows.assign(all=0), "all")
    return frame.iloc[0].to_dict() if len(frame) else dict.fromkeys(
        ("mean", "se", "low", "high"), math.nan) | {"n": 0}


def text_of(entry: dict[str, float], digits: int = 3) -> str:
    """A mean with its standard error, and the seeds it stands on where they are one."""
    if not entry["n"]:
        return "–"
    text = plain(entry["mean"], digits).replace("-", "\u2212")
    return text + (f" ± {plain(entry['se'], 2)}" if entry["se"] > 0 else "")


def plain(value: float, digits: int) -> str:
    """A number with so many digits that count, without an exponent unless it is extreme."""
    return f"{float(f'{value:.{digits}g}'):g}"


def curve(rows: pd.DataFrame, quantity: str, over: str = "sigma") -> pd.DataFrame:
    """A quantity over levels: the same, by level."""
    return over_seeds(rows[(rows.quantity == quantity) & (rows.over == over)])


def single(rows: pd.DataFrame, quantity: str, over: str = "run") -> dict[str, float]:
    """A quantity that is one number per run; over "law": its mean under the law of training."""
    return one(rows[(rows.quantity == quantity) & (rows.over == over)])


def rounded(cell: Cell) -> str:
    """Of which variants half precision changes a batch's gradient by a tenth of its noise or more,
    under the law of training: their comparisons may be of rounding; "" where there are none."""
    rows = rows_of(cell, "gradient_rounding")
    found = {str(n): single(rows[rows.name == n], "error_over_noise", "law")["mean"]
             for n in dict.fromkeys(rows.name)}
    told = ", ".join(f"{n} {plain(x, 2)}" for n, x in found.items() if x >= ROUNDS)
    return told and (
        "half precision rounds much of a batch's gradient in units of the batch's noise: "
        f"{told}. Comparisons of these may be of rounding: see Half precision.")


def measured(rows: pd.DataFrame, quantity: str, over: str = "sigma") -> bool:
    """Whether a quantity has values over levels."""
    return len(curve(rows, quantity, over)) > 0


def draw(axes: Axes, frame: pd.DataFrame, drawn: Look, label: str | None = None,
         style: Any = None, positive: bool = False) -> bool:  # noqa: ANN401
    """One line over levels with its bars and band; style: of the line, None for the variant's own;
    positive: only what is, for logarithmic axes. Returns whether there was anything to draw."""
    frame = frame[frame["mean"] > 0] if positive else frame
    if frame.empty:
        return False
    se = frame["se"].fillna(0).to_numpy()
    below = np.minimum(se, 0.9 * frame["mean"].to_numpy()) if positive else se
    axes.errorbar(frame.index, frame["mean"], yerr=[below, se], color=drawn.colour, label=label,
                  linestyle=drawn.line if style is None else style, marker=drawn.marker, ms=4.5,
                  mew=0, elinewidth=1.1, capsize=2)
    if (frame["n"] > 1).any():
        low = frame["low"].where(frame["low"] > 0, frame["mean"]) if positive else frame["low"]
        axes.fill_between(frame.index, low, frame["high"], color=drawn.colour, alpha=0.13, lw=0)
    return True


def lines(axes: Axes, rows: pd.DataFrame, colours: dict[str, Any], styles: dict[str, Any],
          over: str = "sigma", law: str | None = "", positive: bool = True) -> None:
    """A line per variant that has rows, in file order, and quantity. styles: by quantity, None for
    the variant's own; law: the quantity whose average under the law of training stands beside the
    name in the legend, "" for the name alone, None for no entry."""
    for name in (n for n in colours if (rows.name == n).any()):
        own = rows[rows.name == name]
        label = name if law == "" else law and f"{name}: {text_of(single(own, law, 'law'), 2)}"
        for quantity, style in styles.items():
            draw(axes, curve(own, quantity, over), look(colours, name), label, style, positive)
            label = None


def t_star(cell: Cell) -> float:
    """t* of the cell's data, from its score errors; nan if unknown or if data are endless."""
    return float(cell.score_errors["t_star"].mean())


def mark(cell: Cell, grid: Iterable[Axes]) -> None:
    """The line at t* in each panel, if it lies within the levels drawn."""
    star = t_star(cell)
    for axes in grid:
        low, high = axes.get_xlim()
        if low < star < high:
            axes.axvline(star, color=GREY, lw=1.2, ls="-.", label=STAR)


def star_text(cell: Cell) -> str:
    """What t* says about any variance below it."""
    rows, star = cell.score_errors, t_star(cell)
    if rows.empty:
        return "t* of these data is not known here: no score error is measured."
    if star != star:
        return "These data are endless: there is no t*, the posterior is never one image."
    return (f"Below t* = {star:.3g} the posterior over the training set is one image and any test "
            "of variance is empty.")
