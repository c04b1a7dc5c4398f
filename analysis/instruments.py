"""Figures of the gradient: its noise, its direction, how far a step goes, and the limit of N; and
of trajectories: is one of them one output, and whose?

Everything is measured at fixed weights, per noise level; the gradient also under the law of
training, whose mean stands in the legend. Levels are drawn as they were measured, on the grid of
a run's own N.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import words
from analysis.identities import PATHS
from analysis.levels import (
    BARS,
    OWN,
    RATIO,
    SIGMA,
    curve,
    draw,
    lines,
    mark,
    measured,
    rows_of,
    single,
    stands_on,
    star_text,
)
from analysis.load import Cell
from analysis.style import (
    GREY,
    INK,
    PALE,
    Drawn,
    Look,
    capital,
    legend,
    look,
    panels,
    plain_log,
)

DASHED = (0, (3, 2))
SHARES = (("rho", r"$\rho$, gradients as they are"),
          ("rho_adam", r"$\rho$ in Adam's metric"))
PARTS = (("estimator", "estimate of the score", INK), ("dropout", "dropout's mask", "#9aa5b1"),
         ("draw", "draw of $(t, x_t)$", PALE))
STEPS = (("step_over_c", "Step over the distance's $c$"), ("step", "Step in units of the data"))
SLOPES = (("loss_ratio", "slope_loss", "losses' relative difference"),
          ("gradient_difference", "slope_gradient", "mean gradients' relative difference"))
ROUNDING = (("Gradient", "relative error", {"error": "-", "bias": DASHED}),
            ("Step $f(x_t, t) - f^-(x_r, r)$", "relative error", {"residual_error": "-"}),
            ("Gradient's error over sampling noise", None, {"error_over_noise": "-"}))


def _row(n: int, high: float = 3.7) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    width = 4.6 * n if n > 1 else 7
    return panels(n, n, width, high, sharex=True)


def _key(axes: Axes, solid: str, dashed: str) -> None:
    """What the two kinds of lines are, in the legend."""
    axes.plot([], [], color=INK, label=solid)
    axes.plot([], [], color=INK, ls=DASHED, label=dashed)


def _over_t(axes: Axes, title: str, label: str | None = None) -> None:
    """Makes a panel one of values over noise levels, both logarithmic."""
    axes.set(xscale="log", yscale="log", xlabel=SIGMA, ylabel=label)
    axes.set_title(title, fontsize=10)


def _signal(axes: Axes, rows: pd.DataFrame, colours: dict[str, Any], styles: dict[str, Any]
            ) -> None:
    """A panel of signal to noise."""
    lines(axes, rows, colours, styles, law=None)
    _over_t(axes, "Signal to noise, one image", "squared mean over variance")


def noise(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """rho against t, as it is and in Adam's metric, and the signal-to-noise ratio."""
    rows = rows_of(cell, "gradient_noise")
    shown = [(q, label) for q, label in SHARES if measured(rows, q)]
    if not shown:
        return None
    figure, grid = _row(len(shown) + measured(rows, "snr"))
    for axes, (quantity, label) in zip(grid, shown, strict=False):
        lines(axes, rows, colours, {quantity: None}, law="rho", positive=False)
        axes.set(xscale="log", xlabel=SIGMA)
        top = max(axes.get_ylim()[1], 0.05)
        top = top if top < 0.5 else max(top, 1.03)
        axes.set_ylim(min(axes.get_ylim()[0], -0.03 * top), top)
        axes.set_title(label, fontsize=10)
    grid[0].set_ylabel("share of the gradient's variance")
    for axes in grid[len(shown):]:
        _signal(axes, rows, colours, {"snr": None})
    mark(cell, grid)
    legend(figure, grid[:1], 4)
    return figure, (
        "rho is the share of the gradient's variance that comes from the estimate of the score: "
        "the part that another x with the same x_t changes; a score that is a function of x_t has "
        "0. Legend: its mean under the law of training, ± one standard error. In Adam's metric "
        "every coordinate is divided by the root of its second moment. "
        f"{RATIO} {OWN} {BARS} {star_text(cell)} {stands_on(cell, rows)}"), None


def parts(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """The gradient's variance by origin, stacked as shares of the total, a panel per variant."""
    rows = rows_of(cell, "gradient_noise")
    rows = rows[rows.over == "sigma"]
    known = [n for n in colours if measured(rows[rows.name == n], "total")]
    noisy = rows[rows.quantity.isin(["estimator", "dropout"]) & rows["value"].gt(0)]
    names = [n for n in known if (noisy.name == n).any()]
    if not names:
        return None
    shown = [p for p in PARTS if p[0] != "dropout" or noisy.quantity.eq("dropout").any()]
    still = ", ".join(n for n in known if n not in names)
    columns = math.ceil(len(names) / math.ceil(len(names) / 4))
    figure, grid = panels(len(names), columns, max(2.9 * columns, 5), 2.6, 0.7, sharex=True,
                          sharey=True)
    for axes, name in zip(grid, names, strict=True):
        mean = pd.DataFrame({q: curve(rows[rows.name == name], q)["mean"]
                             for q in ("total", *(p[0] for p in shown))}).dropna()
        axes.stackplot(mean.index, [(mean[q] / mean["total"]).clip(0) for q, *_ in shown],
                       labels=[p[1] for p in shown], colors=[p[2] for p in shown], lw=0)
        axes.set(xscale="log", ylim=(0, 1))
        axes.set_title(name, fontsize=10, color=colours[name])
        axes.set_xlim(rows.level.min(), rows.level.max())
        axes.tick_params(labelbottom=True)
    mark(cell, grid)
    for axes in grid[-columns:]:
        axes.set_xlabel(SIGMA)
    for axes in grid[::columns]:
        axes.set_ylabel("share of variance")
    legend(figure, grid[:1], 4)
    return figure, (
        "Where the variance of one image's gradient comes from, per noise level, as shares of its "
        "total, means over seeds: black is rho. The parts are unbiased estimates; what comes out "
        "below 0 is drawn as 0. Their sizes stand in the table. "
        + f"Not drawn, all of theirs being that of the draw: {still}. " * bool(still)
        + f"{star_text(cell)} {stands_on(cell, rows)}"), None


def step(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """How far f moves in one step, over the distance's c where it has one."""
    rows = rows_of(cell, "gradient_noise")
    shown = [(q, label) for q, label in STEPS if measured(rows, q)]
    if not shown:
        return None
    figure, grid = _row(len(shown))
    for axes, (quantity, label) in zip(grid, shown, strict=True):
        lines(axes, rows, colours, {quantity: None})
        _over_t(axes, label)
        if quantity == "step_over_c":
            axes.axhline(1, color=GREY, lw=1.2)
    legend(figure, sorted(grid, key=lambda a: -len(a.get_legend_handles_labels()[0]))[:1], 4)
    return figure, (
        "How far one step of the loss goes: the norm |f(x_t, t) - f^-(x_r, r)| of a whole image, "
        "root mean square over images. Over c: well above the line at 1 the pseudo-Huber distance "
        "is a norm, whose gradient does not see how far, well below it a square. A variant "
        f"without c has no line there. {BARS} {stands_on(cell, rows)}"), None


def cosine(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Cosine of the mean gradients of two scores against t, and the signal-to-noise of each."""
    rows = rows_of(cell, "gradient_cosine")
    if not measured(rows, "cosine"):
        return None
    figure, grid = _row(1 + (measured(rows, "snr_score") or measured(rows, "snr_against")))
    grid[0].axhline(1, color=GREY, lw=1.2)
    lines(grid[0], rows, colours, {"cosine": "-"}, law="cosine", positive=False)
    first, second = compared(cell, rows)
    for axes in grid[1:]:
        _signal(axes, rows, colours, {"snr_score": "-", "snr_against": DASHED})
        _key(axes, first, second)
        axes.legend(fontsize=8)
    grid[0].set(xscale="log", xlabel=SIGMA, ylabel="cosine, noise removed")
    grid[0].set_title("Do the two scores push the same way?", fontsize=10)
    mark(cell, grid)
    legend(figure, grid[:1], 4)
    return figure, (
        f"Cosine of the mean gradients that {first} and {second} give at the same weights on the "
        "same batches, noise removed, so that it may leave [-1, 1]. At 1 (line) they differ in "
        "noise and length alone. Where the signal to noise is small the cosine is not told. "
        f"Legend: under the law of training, ± one standard error. {OWN} {BARS} "
        f"{star_text(cell)} {stands_on(cell, rows)}"), None


def rounding(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Errors of half precision against t: of the gradient, of the step it is made of, and beside
    the noise."""
    rows = rows_of(cell, "gradient_rounding")
    shown = [p for p in ROUNDING if any(measured(rows, quantity) for quantity in p[2])]
    if not shown:
        return None
    figure, grid = _row(len(shown))
    for axes, (title, label, styles) in zip(grid, shown, strict=True):
        lines(axes, rows, colours, styles, law="error")
        if len(styles) > 1:
            _key(axes, "one batch", "mean gradient")
        else:
            axes.axhline(1, color=GREY, lw=1.2)
        _over_t(axes, title, label)
    legend(figure, grid[:1], 4)
    return figure, (
        "What half precision changes, against float32 at the same weights on the same batches. "
        "Legend: the error of one batch's gradient under the law of training, ± one standard "
        "error. Dashed: that of the mean gradient, noise removed; not drawn where noise leaves "
        "its square negative. At 1 (line) a step is all rounding, or rounding as large as the "
        f"noise of the batch. {OWN} {BARS} {stands_on(cell, rows)}"), None


def compared(cell: Cell, rows: pd.DataFrame) -> tuple[str, str]:
    """The two scores of a cosine or of slopes, in words."""
    asked = cell.study.settings[rows["file"].iloc[0]]
    return tuple(words.factor_text(asked.get(k) or {"kind": "single_sample"})
                 for k in ("score", "against"))


def slopes(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Losses of two scores against N, and their relative differences with fitted slopes."""
    rows = rows_of(cell, "gradient_slopes")
    shown = [panel for panel in SLOPES if measured(rows, panel[0], "N")]
    losses = measured(rows, "loss_score", "N") or measured(rows, "loss_against", "N")
    if not shown and not losses:
        return None
    figure, grid = _row(len(shown) + losses, 4.0)
    first, second = compared(cell, rows)
    for axes in grid[:losses]:
        lines(axes, rows, colours, {"loss_score": "-", "loss_against": DASHED}, "N")
        _key(axes, first, second)
        axes.set_title("Mean losses", fontsize=10)
    for axes, (quantity, slope, label) in zip(grid[losses:], shown, strict=True):
        for name in (n for n in colours if (rows.name == n).any()):
            _slope(axes, rows[rows.name == name], quantity, slope, look(colours, name))
        axes.set_title(capital(label), fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, loc="best", title="fitted / predicted slope",
                        title_fontsize=7.5)
    for axes in grid:
        axes.set(xscale="log", yscale="log", xlabel="grid points $N$")
        at = sorted(rows[rows.over == "N"].level.unique())
        axes.set_xticks(at, [f"{n:g}" for n in at])
        axes.set_xticks([], minor=True)
        plain_log(axes.yaxis)
    legend(figure, grid[:1], 4)
    return figure, (
        f"The losses and mean gradients of {first} and {second} at the same weights on the same "
        "batches, as the grid becomes finer. Differences are relative to the second; solid lines "
        "have the fitted slope, dotted ones the predicted. A difference that does not fall is one "
        f"that no N removes. {BARS} {stands_on(cell, rows)}"), None


def _slope(axes: Axes, rows: pd.DataFrame, quantity: str, slope: str, drawn: Look) -> None:
    """The points of one variant with the line of its fitted slope and that of the predicted."""
    points = curve(rows, quantity, "N")
    found, wanted = single(rows, slope), single(rows, f"predicted_{slope}")
    told = [f"{round(entry['mean'], 2) + 0.0:.2f}".replace("-", "\u2212") if entry["n"] else "–"
            for entry in (found, wanted)]
    if not draw(axes, points, drawn, " / ".join(told), "none", True):
        return
    points = points[points["mean"] > 0]
    x = np.array([points.index.min(), points.index.max()], dtype=float)
    centre, height = (np.log(v.to_numpy()).mean() for v in (points.index, points["mean"]))
    for entry, style, wide in ((found, "-", 1.6), (wanted, ":", 1.2)):
        if entry["n"]:
            axes.plot(x, np.exp(height + entry["mean"] * (np.log(x) - centre)), ls=style, lw=wide,
                      color=drawn.colour, marker="")


# --- trajectories --------------------------------------------------------------------------------


def there(rows: pd.DataFrame) -> list[str]:
    """The paths that were measured."""
    return [p for p in PATHS if measured(rows, p)]


def _paths(rows: pd.DataFrame, colours: dict[str, Any], shown: list[tuple[str, str]],
           floor: float = math.nan) -> Figure:
    """A panel of distances against t for each quantity, under its title; floor: drawn where the
    path is a teacher's."""
    n = len(shown)
    columns = 2 if n == 4 else min(n, 3)
    figure, grid = panels(n, columns, 4.4 * columns if n > 1 else 6.5, 3.3, 0.4, sharex=True,
                          sharey=True)
    for axes, (quantity, title) in zip(grid, shown, strict=True):
        lines(axes, rows, colours, {quantity: None})
        axes.set(xscale="log", yscale="log")
        axes.set_title(title, fontsize=10)
        if floor == floor and quantity.endswith("teacher"):
            axes.axhline(floor, color=INK, lw=1.1, ls=":", label="floor: two teachers")
    for axes in grid[-columns:]:
        axes.set_xlabel(SIGMA)
    for axes in grid[::columns]:
        axes.set_ylabel("root mean square, units of the data")
    for axes in grid:
        plain_log(axes.yaxis)
    legend(figure, grid, 6)
    return figure


def ends(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Distance of f to the end of the probability-flow ODE of each known score, against t."""
    rows = rows_of(cell, "trajectories")
    shown = [(p, f"To the end of {PATHS[p]} path") for p in there(rows)]
    if not shown:
        return None
    figure = _paths(rows, colours, shown, single(rows, "floor")["mean"])
    return figure, (
        "Distance of f(x(t), t) to the end of the probability-flow ODE's path through x(t), the "
        "path being that of each score that is known. An exact consistency model of that score "
        "has 0 at every t; at the smallest level it is 0 by construction and not drawn. The floor "
        "is the distance between the ends of two teachers' paths from the same start: nearer than "
        f"that to one of them is as near as teachers are to each other. {BARS} "
        f"{stands_on(cell, rows)}"), None


def drift(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """How far f moves along the ODE's paths and along consistency training's straight line."""
    rows = rows_of(cell, "trajectories")
    every = [*((f"drift_{p}", f"Along {PATHS[p]} path") for p in there(rows)),
             ("straight", "Along the straight line $x + t z$")]
    shown = [line for line in every if measured(rows, line[0])]
    if not shown:
        return None
    return _paths(rows, colours, shown), (
        "Distance of f(x(t), t) to f(x(T), T), the output at the start of the same path: a "
        "consistency model of that path has 0. Along x + t z, the line that consistency training "
        "moves on, no function is constant for all x, so what is left there is no error. The "
        "number beside it in the table, the spread, is that of f about its mean along a path. "
        f"{BARS} {stands_on(cell, rows)}"), None
