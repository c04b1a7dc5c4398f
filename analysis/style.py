"""What all figures share: colours, typography, and a way to save that repeats its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.load import Study
from analysis.recipes import computed

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
