"""What all figures share: colours, typography, and a way to save that repeats its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.load import Study
from analysis.recipes import computed

STAR = "$t^*$"
INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = (*sns.color_palette("colorblind").as_hex()[:6], "#56b4e9", "#6a3d9a", "#6b7280",
           "#1b7837")  # its pale pink and yellow vanish on white
MARKERS = "osD^vPX*<>hp"
LINES = ("-", (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))  # of variants that share a colour; not dashed
STYLE = {**sns.axes_style("ticks"), **sns.plotting_context("notebook", font_scale=0.85),
         "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK,
         "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": PALE,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False,
         "font.family": ["DejaVu Sans"], "figure.dpi": 144, "lines.linewidth": 1.8}
# figure, caption, ids of the runs drawn (None: the caption itself says what it stands on)
Drawn = tuple[Figure, str, list[str] | None] | None


def palette(study: Study) -> dict[str, Any]:
    """One colour per variant name, in file order, kept over all figures: distinct ones, which
    come again where they are used up and are then told apart by `look`. Fixed points have softer
    ones of their own."""
    own = [r for r in study.recipes if r["role"] == "variant"]
    names = list(dict.fromkeys(r["name"] for r in own))
    fixed = {r["name"] for r in own if computed(r)}
    trained = [n for n in names if n not in fixed]
    found = {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(trained)}
    soft = iter(sns.husl_palette(len(fixed), s=0.5, l=0.6).as_hex() if fixed else ())
    return {n: found.get(n) or next(soft) for n in names}


class Look(NamedTuple):
    """How a variant is drawn in every figure."""

    colour: Any
    marker: str
    line: Any


def look(colours: dict[str, Any], name: str) -> Look:
    """A variant's colour with its marker, and its line: another one for each that shares the
    colour."""
    names = list(colours)
    at = names.index(name)
    before = sum(colours[n] == colours[name] for n in names[:at])
    return Look(colours[name], MARKERS[at % len(MARKERS)], LINES[before % len(LINES)])


def panels(n: int, columns: int, width: float, high: float, more: float = 0.0, **share: bool
           ) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, so many in a row. width: of the figure, high: of a row, more: for
    what stands below, in inches; share: sharex and sharey."""
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width, high * rows + more), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for axes in grid[n:]:
        axes.axis("off")
    for axes in grid[max(n - columns, 0):n]:
        axes.tick_params(labelbottom=True)  # also where an empty place is below it
    return figure, grid[:n]


def legend(figure: Figure, grid: Iterable[Axes], columns: int) -> None:
    """One legend below all panels, each label once, t* last."""
    known: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    known = dict(sorted(known.items(), key=lambda pair: pair[0] == STAR))
    figure.legend(known.values(), known.keys(), loc="outside lower center", fontsize=9,
                  ncols=min(columns, max(len(known), 1)))


def plain_log(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis that spans little more than a decade, or less."""
    low, high = axis.get_view_interval()
    if 0 < low < high < 20 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 6 * low else MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the picture alone."""
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", facecolor="white")


def capital(text: str) -> str:
    """The text with its first letter raised and the rest left alone."""
    return text[:1].upper() + text[1:]
