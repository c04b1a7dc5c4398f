"""Figures of the gradient: its noise, its direction, how far a step goes, and the limit of N.

Everything is measured at fixed weights, per noise level, and under the law of training, whose mean
stands in the legend. Levels are drawn as they were measured, on the grid of a run's own N.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import words
from analysis.levels import (
    BARS,
    OWN,
    RATIO,
    SIGMA,
    STAR,
    draw,
    law_of,
    mark,
    one,
    over_seeds,
    rows_of,
    stands_on,
    star_text,
    t_star,
)
from analysis.load import Study
from analysis.style import GREY, INK, PALE, Drawn, Look, look, plain_log

SHARES = (("rho", r"$\rho$, gradients as they are"),
          ("rho_adam", r"$\rho$ in Adam's metric"))
PARTS = (("estimator", "estimate of the score", INK), ("dropout", "dropout's mask", "#9aa5b1"),
         ("draw", "draw of $(t, x_t)$", PALE))
STEPS = (("step_over_c", "Step over the distance's $c$"), ("step", "Step in units of the data"))
SLOPES = (("loss_ratio", "slope_loss", "losses' relative difference"),
          ("gradient_difference", "slope_gradient", "mean gradients' relative difference"))

ROUNDING = (("Gradient", "relative error", (("error", "-"), ("bias", (0, (3, 2))))),
            ("Step $f(x_t, t) - f^-(x_r, r)$", "relative error", (("residual_error", "-"),)),
            ("Gradient's error over sampling noise", None, (("error_over_noise", "-"),)))


def _names(rows: pd.DataFrame, colours: dict[str, Any]) -> list[str]:
    """The variants that have rows, in file order."""
    there = set(rows.name)
    return [n for n in colours if n in there]


def _curve(rows: pd.DataFrame, name: str, quantity: str, over: str = "sigma") -> pd.DataFrame:
    return over_seeds(rows[(rows.name == name) & (rows.quantity == quantity)
                           & (rows.over == over)])


def _measured(rows: pd.DataFrame, quantity: str, over: str = "sigma") -> bool:
    return bool(rows[(rows.quantity == quantity) & (rows.over == over)]["value"].notna().any())


def _grid(panels: int, high: float = 3.7) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * panels if panels > 1 else 7, high), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=True)[0])


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    known = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == STAR))
    figure.legend(known.values(), known.keys(), loc="outside lower center", fontsize=9,
                  ncols=min(columns, max(len(known), 1)))


def noise(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """rho against t, as it is and in Adam's metric, and the signal-to-noise ratio."""
    rows = rows_of(study, cell, "gradient_noise")
    shown = [(q, label) for q, label in SHARES if _measured(rows, q)]
    if not shown:
        return None
    snr = _measured(rows, "snr")
    figure, grid = _grid(len(shown) + snr)
    for axes, (quantity, label) in zip(grid, shown, strict=False):
        for name in _names(rows, colours):
            told = f"{name}: {law_of(rows[rows.name == name], 'rho')}"
            draw(axes, _curve(rows, name, quantity), look(colours, name), told)
        axes.set(xscale="log", xlabel=SIGMA)
        top = max(axes.get_ylim()[1], 0.05)
        top = top if top < 0.5 else max(top, 1.03)
        axes.set_ylim(min(axes.get_ylim()[0], -0.03 * top), top)
        axes.set_title(label, fontsize=10)
    grid[0].set_ylabel("share of the gradient's variance")
    if snr:
        for name in _names(rows, colours):
            draw(grid[-1], _curve(rows, name, "snr"), look(colours, name), positive=True)
        grid[-1].set(xscale="log", yscale="log", xlabel=SIGMA, ylabel="squared mean over variance")
        grid[-1].set_title("Signal to noise, one image", fontsize=10)
    for axes in grid:
        mark(axes, t_star(study, cell))
    _legend(figure, grid[0])
    return figure, (
        "rho is the share of the gradient's variance that comes from the estimate of the score: "
        "the part that another x with the same x_t changes; a score that is a function of x_t has "
        "0. Legend: its mean under the law of training, ± one standard error. In Adam's metric "
        "every coordinate is divided by the root of its second moment. "
        f"{RATIO} {OWN} {BARS} "
        + star_text(study, cell) + " " + stands_on(study, cell, "gradient_noise", rows)), None


def parts(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """The gradient's variance by origin, stacked as shares of the total, a panel per variant."""
    rows = rows_of(study, cell, "gradient_noise")
    rows = rows[rows.over == "sigma"]
    measured = [n for n in _names(rows, colours) if _measured(rows[rows.name == n], "total")]
    noisy = rows[rows.quantity.isin(["estimator", "dropout"]) & rows["value"].gt(0)]
    names = [n for n in measured if (noisy.name == n).any()]
    if not names:
        return None
    shown = [p for p in PARTS if p[0] != "dropout" or noisy.quantity.eq("dropout").any()]
    still = ", ".join(n for n in measured if n not in names)
    tall = math.ceil(len(names) / 4)
    columns = math.ceil(len(names) / tall)
    figure = Figure(figsize=(max(2.9 * columns, 5), 2.6 * tall + 0.7), layout="constrained")
    grid = figure.subplots(tall, columns, squeeze=False, sharex=True, sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        mean = pd.DataFrame({q: _curve(rows, name, q)["mean"]
                             for q in ("total", *(p[0] for p in shown))}).dropna()
        axes.stackplot(mean.index, [(mean[q] / mean["total"]).clip(0) for q, *_ in shown],
                       labels=[p[1] for p in shown], colors=[p[2] for p in shown], lw=0)
        axes.set(xscale="log", ylim=(0, 1))
        axes.set_title(name, fontsize=10, color=colours[name])
    for axes in list(grid.flat)[:len(names)]:
        axes.set_xlim(rows.level.min(), rows.level.max())
        axes.tick_params(labelbottom=True)
        mark(axes, t_star(study, cell))
    for axes in list(grid.flat)[len(names):]:
        axes.axis("off")
    for axes in list(grid.flat)[max(len(names) - columns, 0):len(names)]:
        axes.set_xlabel(SIGMA)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of variance")
    _legend(figure, grid[0, 0])
    return figure, (
        "Where the variance of one image's gradient comes from, per noise level, as shares of its "
        "total, means over seeds: black is rho. The parts are unbiased estimates; what comes out "
        "below 0 is drawn as 0. Their sizes stand in the table. "
        + f"Not drawn, all of theirs being that of the draw: {still}. " * bool(still)
        + star_text(study, cell) + " "
        + stands_on(study, cell, "gradient_noise", rows)), None


def step(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """How far f moves in one step, over the distance's c where it has one."""
    rows = rows_of(study, cell, "gradient_noise")
    shown = [(q, label) for q, label in STEPS if _measured(rows, q)]
    if not shown:
        return None
    figure, grid = _grid(len(shown))
    for axes, (quantity, label) in zip(grid, shown, strict=True):
        for name in _names(rows, colours):
            draw(axes, _curve(rows, name, quantity), look(colours, name), name, positive=True)
        axes.set(xscale="log", yscale="log", xlabel=SIGMA)
        axes.set_title(label, fontsize=10)
        if quantity == "step_over_c":
            axes.axhline(1, color=GREY, lw=1.2)
    handles = max(grid, key=lambda a: len(a.get_legend_handles_labels()[0]))
    _legend(figure, handles)
    return figure, (
        "How far one step of the loss goes: the norm |f(x_t, t) - f^-(x_r, r)| of a whole image, "
        "root mean square over images. Over c: well above the line at 1 the pseudo-Huber distance "
        "is a norm, whose gradient does not see how far, well below it a square. A variant "
        f"without c has no line there. {BARS} "
        + stands_on(study, cell, "gradient_noise", rows)), None


def cosine(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Cosine of the mean gradients of two scores against t, and the signal-to-noise of each."""
    rows = rows_of(study, cell, "gradient_cosine")
    if not _measured(rows, "cosine"):
        return None
    snr = _measured(rows, "snr_score") or _measured(rows, "snr_against")
    figure, grid = _grid(1 + snr)
    grid[0].axhline(1, color=GREY, lw=1.2)
    for name in _names(rows, colours):
        told = f"{name}: {law_of(rows[rows.name == name], 'cosine')}"
        draw(grid[0], _curve(rows, name, "cosine"), look(colours, name), told, "-")
        for quantity, style in (("snr_score", "-"), ("snr_against", (0, (3, 2)))) if snr else ():
            draw(grid[-1], _curve(rows, name, quantity), look(colours, name), None, style, True)
    grid[0].set(xscale="log", xlabel=SIGMA, ylabel="cosine, noise removed")
    grid[0].set_title("Do the two scores push the same way?", fontsize=10)
    one_, other = compared(study, rows)
    if snr:
        grid[1].set(xscale="log", yscale="log", xlabel=SIGMA, ylabel="squared mean over variance")
        grid[1].set_title("Signal to noise, one image", fontsize=10)
        grid[1].plot([], [], color=INK, label=one_)
        grid[1].plot([], [], color=INK, ls=(0, (3, 2)), label=other)
        grid[1].legend(fontsize=8, title_fontsize=8)
    for axes in grid:
        mark(axes, t_star(study, cell))
    _legend(figure, grid[0])
    return figure, (
        f"Cosine of the mean gradients that {one_} and {other} give at the same weights on the "
        "same batches, noise removed, so that it may leave [-1, 1]. At 1 (line) they differ in "
        "noise and length alone. Where the signal to noise is small the cosine is not told. "
        f"Legend: under the law of training, ± one standard error. {OWN} {BARS} "
        f"{star_text(study, cell)} "
        + stands_on(study, cell, "gradient_cosine", rows)), None


def rounding(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Errors of half precision against t: of the gradient, of the step it is made of, and beside
    the noise."""
    rows = rows_of(study, cell, "gradient_rounding")
    shown = [p for p in ROUNDING if any(_measured(rows, quantity) for quantity, _ in p[2])]
    if not shown:
        return None
    figure, grid = _grid(len(shown))
    for axes, (title, label, lines) in zip(grid, shown, strict=True):
        for name in _names(rows, colours):
            told = f"{name}: {law_of(rows[rows.name == name], 'error')}"
            for quantity, style in lines:
                draw(axes, _curve(rows, name, quantity), look(colours, name),
                     told if style == "-" else None, style, positive=True)
        if len(lines) > 1:
            axes.plot([], [], color=INK, label="one batch")
            axes.plot([], [], color=INK, ls=(0, (3, 2)), label="mean gradient")
        else:
            axes.axhline(1, color=GREY, lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel=SIGMA, ylabel=label)
        axes.set_title(title, fontsize=10)
    _legend(figure, grid[0])
    return figure, (
        "What half precision changes, against float32 at the same weights on the same batches. "
        "Legend: the error of one batch's gradient under the law of training, ± one standard "
        "error. Dashed: that of the mean gradient, noise removed; not drawn where noise leaves "
        "its square negative. At 1 (line) a step is all rounding, or rounding as large as the "
        f"noise of the batch. {OWN} {BARS} "
        + stands_on(study, cell, "gradient_rounding", rows)), None


def compared(study: Study, rows: pd.DataFrame) -> tuple[str, str]:
    """The two scores of a cosine or of slopes, in words."""
    asked = study.settings[rows["file"].iloc[0]]
    return tuple(words.factor_text(asked.get(k) or {"kind": "single_sample"})
                 for k in ("score", "against"))


def slopes(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Losses of two scores against N, and their relative differences with fitted slopes."""
    rows = rows_of(study, cell, "gradient_slopes")
    shown = [panel for panel in SLOPES if _measured(rows, panel[0], "N")]
    losses = [q for q in ("loss_score", "loss_against") if _measured(rows, q, "N")]
    if not shown and not losses:
        return None
    figure, grid = _grid(len(shown) + bool(losses), 4.0)
    one_, other = compared(study, rows)
    if losses:
        axes, *_ = grid
        for name in _names(rows, colours):
            for quantity, style in (("loss_score", "-"), ("loss_against", (0, (3, 2)))):
                draw(axes, _curve(rows, name, quantity, "N"), look(colours, name),
                     name if quantity == "loss_score" else None, style, True)
        axes.plot([], [], color=INK, label=one_)
        axes.plot([], [], color=INK, ls=(0, (3, 2)), label=other)
        axes.set_title("Mean losses", fontsize=10)
    for axes, (quantity, slope, label) in zip(grid[bool(losses):], shown, strict=True):
        for name in _names(rows, colours):
            _slope(axes, rows[rows.name == name], quantity, slope, look(colours, name))
        axes.set_title(label[:1].upper() + label[1:], fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, loc="best", title="fitted / predicted slope",
                        title_fontsize=7.5)
    for axes in grid:
        axes.set(xscale="log", yscale="log", xlabel="grid points $N$")
        at = sorted(rows[rows.over == "N"].level.unique())
        axes.set_xticks(at, [f"{n:g}" for n in at])
        axes.set_xticks([], minor=True)
        plain_log(axes.yaxis)
    _legend(figure, grid[0])
    return figure, (
        f"The losses and mean gradients of {one_} and {other} at the same weights on the same "
        "batches, as the grid becomes finer. Differences are relative to the second; solid lines "
        "have the fitted slope, dotted ones the predicted. A difference that does not fall is one "
        f"that no N removes. {BARS} "
        + stands_on(study, cell, "gradient_slopes", rows)), None


def _slope(axes: Axes, rows: pd.DataFrame, quantity: str, slope: str, drawn: Look) -> None:
    """The points of one variant with the line of its fitted slope and that of the predicted."""
    curve = _curve(rows, rows.name.iloc[0], quantity, "N")
    single = rows[rows.over == "run"]
    found = one(single[single.quantity == slope])
    wanted = one(single[single.quantity == f"predicted_{slope}"])
    told = [f"{round(entry['mean'], 2) + 0.0:.2f}".replace("-", "\u2212") if entry["n"] else "–"
            for entry in (found, wanted)]
    if not draw(axes, curve, drawn, " / ".join(told), "none", True):
        return
    curve = curve[curve["mean"] > 0]
    x = np.array([curve.index.min(), curve.index.max()], dtype=float)
    centre, height = (np.log(v.to_numpy()).mean() for v in (curve.index, curve["mean"]))
    for entry, style, wide in ((found, "-", 1.6), (wanted, ":", 1.2)):
        if entry["n"]:
            axes.plot(x, np.exp(height + entry["mean"] * (np.log(x) - centre)), ls=style, lw=wide,
                      color=drawn.colour, marker="")
