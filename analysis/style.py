"""What all figures share: colours, typography, and a way to save that repeats its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure

from analysis.load import Study

INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = (*sns.color_palette("colorblind").as_hex()[:6], "#56b4e9", "#6a3d9a", "#6b7280",
           "#1b7837")  # its pale pink and yellow vanish on white
MARKERS = "osD^vPX*<>hp"
STYLE = {**sns.axes_style("ticks"), **sns.plotting_context("notebook", font_scale=0.85),
         "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK,
         "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": PALE,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False,
         "font.family": ["DejaVu Sans"], "figure.dpi": 144, "lines.linewidth": 1.8}
# figure, caption, ids of the runs drawn (None: the caption itself says what it stands on)
Drawn = tuple[Figure, str, list[str] | None] | None


def palette(study: Study) -> dict[str, Any]:
    """One colour per variant name, in file order, kept over all figures."""
    names = list(dict.fromkeys(r["name"] for r in study.recipes if r["role"] == "variant"))
    few = len(names) <= len(COLOURS)
    colours = COLOURS[:len(names)] if few else sns.color_palette("husl", len(names))
    return dict(zip(names, colours, strict=True))


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the picture alone."""
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", facecolor="white")


def capital(text: str) -> str:
    """The text with its first letter raised and the rest left alone."""
    return text[:1].upper() + text[1:]
