"""Figures of trajectories: is one of them one output, and whose?"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.identities import PATHS
from analysis.levels import BARS, SIGMA, draw, one, over_seeds, rows_of, stands_on
from analysis.load import Study
from analysis.style import INK, Drawn, look, plain_log


def there(rows: pd.DataFrame) -> list[str]:
    """The paths that were measured."""
    return [p for p in PATHS if rows[rows.quantity == p]["value"].notna().any()]


def _panels(panels: int) -> tuple[Figure, list[Axes]]:
    columns = 2 if panels == 4 else min(panels, 3)
    tall = math.ceil(panels / columns)
    figure = Figure(figsize=(4.4 * columns if panels > 1 else 6.5, 3.3 * tall + 0.4),
                    layout="constrained")
    grid = list(figure.subplots(tall, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in grid[panels:]:
        axes.axis("off")
    for axes in grid[max(panels - columns, 0):panels]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(SIGMA)
    for axes in grid[::columns]:
        axes.set_ylabel("root mean square, units of the data")
    return figure, grid[:panels]


def _lines(axes: Axes, rows: pd.DataFrame, quantity: str, colours: dict[str, Any]) -> None:
    for name in (n for n in colours if (rows.name == n).any()):
        own = rows[(rows.name == name) & (rows.quantity == quantity) & (rows.over == "sigma")]
        draw(axes, over_seeds(own), look(colours, name), name, positive=True)
    axes.set(xscale="log", yscale="log")


def _legend(figure: Figure, grid: list[Axes]) -> None:
    known: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        known |= {k: h for k, h in zip(labels, handles, strict=True) if k not in known}
    for axes in grid:
        plain_log(axes.yaxis)
    figure.legend(known.values(), known.keys(), loc="outside lower center", fontsize=9,
                  ncols=min(6, max(len(known), 1)))


def ends(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Distance of f to the end of the probability-flow ODE of each known score, against t."""
    rows = rows_of(study, cell, "trajectories")
    paths = there(rows)
    if not paths:
        return None
    figure, grid = _panels(len(paths))
    floor = one(rows[(rows.over == "run") & (rows.quantity == "floor")])
    for axes, path in zip(grid, paths, strict=True):
        _lines(axes, rows, path, colours)
        if floor["n"] and path.endswith("teacher"):
            axes.axhline(floor["mean"], color=INK, lw=1.1, ls=":", label="floor: two teachers")
        axes.set_title(f"To the end of {PATHS[path]} path", fontsize=10)
    _legend(figure, grid)
    return figure, (
        "Distance of f(x(t), t) to the end of the probability-flow ODE's path through x(t), the "
        "path being that of each score that is known. An exact consistency model of that score "
        "has 0 at every t; at the smallest level it is 0 by construction and not drawn. The floor "
        "is the distance between the ends of two teachers' paths from the same start: nearer than "
        "that to one of them is as near as teachers are to each other. " + BARS + " "
        + stands_on(study, cell, "trajectories", rows)), None


def drift(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """How far f moves along the ODE's paths and along consistency training's straight line."""
    rows = rows_of(study, cell, "trajectories")
    paths = there(rows)
    panels = [(f"drift_{p}", f"Along {PATHS[p]} path") for p in paths]
    panels += [("straight", "Along the straight line $x + t z$")]
    panels = [p for p in panels if rows[rows.quantity == p[0]]["value"].notna().any()]
    if not panels:
        return None
    figure, grid = _panels(len(panels))
    for axes, (quantity, title) in zip(grid, panels, strict=True):
        _lines(axes, rows, quantity, colours)
        axes.set_title(title, fontsize=10)
    _legend(figure, grid)
    return figure, (
        "Distance of f(x(t), t) to f(x(T), T), the output at the start of the same path: a "
        "consistency model of that path has 0. Along x + t z, the line that consistency training "
        "moves on, no function is constant for all x, so what is left there is no error. The "
        "number beside it in the table, the spread, is that of f about its mean along a path. "
        + BARS + " " + stands_on(study, cell, "trajectories", rows)), None
