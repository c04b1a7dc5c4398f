"""Figures of what is not a single number: score error, map error, and the samples themselves.

Errors are drawn against the noise level sigma on logarithmic axes. Their yardstick is the
posterior variance: it is what the single-sample estimate of E[x | x_t] carries as variance.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from analysis import tables, words
from analysis.load import Cell
from analysis.pictures import picture
from analysis.recipes import endless
from analysis.records import renamed
from analysis.style import GREY, INK, STAR, Drawn, capital, legend, look, panels
from study.errors import StudyError

SCORE_PANELS = (("variance", "variance of the estimate given $x_t$"),
                ("effective_samples", "effective number of images in\nthe posterior"),
                ("bias2", "squared bias against the\nknown denoiser"),
                ("distance2", "squared distance of its mean to\nthe empirical posterior mean"),
                ("held_out_loss", "denoising loss on held-out data"))
SMALLEST = 1e-6  # of the largest value in a panel: what lies below is rounding


def score(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Variance and error of each score's estimate against sigma, one panel per quantity.

    A score is measured once, in the folder of one run; its curve is labelled with the score and
    all variants that use it.
    """
    rows = cell.score_errors
    shown = [(k, label) for k, label in SCORE_PANELS if rows[k].notna().any()]
    if not shown:
        return None
    groups = _by_score(cell, list(colours))
    columns = len(shown) if len(shown) < 5 else 3
    figure, grid = panels(len(shown), columns, 3.7 * columns + 0.6, 3.3, 0.8, sharex=True)
    posterior = rows.groupby("sigma")["posterior_variance"].mean()
    hidden = False
    for axes, (key, label) in zip(grid, shown, strict=True):
        axes.tick_params(labelbottom=True)
        top, before = np.nanmax([rows[key].max(), posterior.max()]), []
        if key == "effective_samples":
            sizes = rows.groupby("sigma")["effective_samples"].mean()  # one line for all scores
            axes.plot(sizes.index, sizes, color=INK, marker="o", ms=4, mew=0)
            axes.axhline(1, color=GREY, lw=1)
        for text, sharing, group in groups if f"{key}_se" in rows else ():
            group = group.assign(square=group[f"{key}_se"] ** 2)
            curve_ = group.groupby("sigma").agg(
                mean=(key, "mean"), low=(key, "min"), high=(key, "max"), n=(key, "count"),
                square=("square", "sum"))
            noise = 2 * np.sqrt(curve_["square"]) / curve_["n"].clip(1)
            told = curve_.where(curve_["mean"] > np.maximum(noise, SMALLEST * top))
            mean = told["mean"].to_numpy()
            over = any(len(mean) == len(b) and np.isfinite(mean).any()
                       and np.allclose(mean, b, rtol=0.02, equal_nan=True) for b in before)
            before.append(mean)
            hidden |= over
            colour, marker, line = look(colours, sharing[0]) if sharing else (GREY, "o", "-")
            name = f"{text}: {', '.join(sharing)}" if sharing else text
            axes.plot(told.index, mean, linestyle=(0, (3, 3)) if over else line,
                      marker="" if over else marker, ms=4, mew=0, color=colour,
                      label=name + " (variance 0)" * bool(group["variance"].eq(0).all()))
            if key == "bias2" and mean.size:
                se = told.where(told["mean"] > 0).assign(se=noise / 2)["se"]
                axes.errorbar(told.index, mean, [np.minimum(se, 0.9 * mean), se], color=colour,
                              ls="none", elinewidth=1.1, capsize=2)
            axes.fill_between(told.index, told["low"].where(told["low"] > 0), told["high"],
                              alpha=0.15, lw=0, color=colour)
        if f"{key}_se" in rows:
            axes.plot(posterior.index, posterior.where(posterior > 0), color=INK, lw=1, ls=":",
                      label=r"posterior variance $E\,\mathrm{Tr\,Cov}[x\,|\,x_t]$")
        if rows.t_star.max() > 0:
            axes.axvline(rows.t_star.mean(), color=GREY, lw=1.2, ls="-.", label=STAR)
        axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$",
                 xlim=(rows.sigma.min() / 1.5, rows.sigma.max() * 1.5))
        if top > 0 and f"{key}_se" in rows:
            axes.set_ylim(max(axes.get_ylim()[0], SMALLEST * top), 3 * top)
        axes.set_title(capital(label), fontsize=10)
    grid[0].set_ylabel(f"denoiser units, summed over d = {rows.dimension.iloc[0]:.0f}")
    legend(figure, grid[:1], 2)
    star = rows.t_star.mean()
    caption = ("Error of each score's estimate D^ of E[x | x_t]; divide by sigma^2 for velocity "
               "units, by sigma^4 for score units. Not drawn: what lies within two standard "
               "errors of 0, or below a millionth of the largest.")
    if hidden:
        known = [endless(r) for r in cell.recipes.values() if r["role"] == "variant"]
        means = ("single-sample and the analytic estimate are both the population's posterior"
                 if all(known) else
                 "single-sample and the empirical estimate are both the empirical posterior")
        caption += (" Dashed: a line that would cover another. The held-out loss is that of the "
                    f"estimate's mean, and the means of the {means} mean.")
    if rows.bias2.notna().any():
        caption += " Bars in the panel of the bias: one standard error of the mean."
    if star == star:
        caption += (f" t* = {star:.3g} is the largest sigma at which the posterior over the "
                    "training set is still the one image that made x_t (mean weight .99 or more): "
                    "below it that is all the posterior is, any test of variance is empty, and "
                    "only a trained score differs from that image. Near t* the "
                    "single-sample variance is a rare-event estimate; the posterior variance, "
                    "its exact value, is not.")
    if rows.effective_samples.notna().any():
        caption += (" The effective number of images, 1 / sum of squared posterior weights, is "
                    "the median over points: 1 (line) is a single image.")
    lacking = cell.missing[cell.missing.file.str.contains("-score_error-")]["file"].nunique()
    measured = rows["file"].nunique()
    return figure, (f"{caption} Stands on {measured} of {measured + lacking} distinct "
                    "scores."), None


def _by_score(cell: Cell, names: list[str]) -> list[tuple[str, list[str], pd.DataFrame]]:
    """(the score in words, the variants that use it, its rows) per score, in file order."""
    name_of = dict(zip(cell.runs["id"][::-1], cell.runs["name"][::-1], strict=True))
    first = {n: name_of[i] for n, i in zip(cell.runs["name"], cell.runs["id"], strict=True)}

    def text(given: dict[str, Any], run_names: dict[str, str]) -> str:
        return words.factor_text(renamed(given, run_names))

    sharing: dict[str, list[str]] = {}
    for name, recipe in cell.recipes.items():
        if name in names and "score" not in recipe["ignored"]:
            sharing.setdefault(text(recipe["factors"].get("score", {}), first), []).append(name)
    found: dict[str, list[pd.DataFrame]] = {}
    for given, group in cell.score_errors.groupby("score", sort=False):
        found.setdefault(text(json.loads(str(given)), name_of), []).append(group)
    order = [*sharing, *(t for t in found if t not in sharing)]
    return [(t, sharing.get(t, []), pd.concat(found[t])) for t in order if t in found]


def map_error(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Distance of each variant to the exact consistency map against sigma."""
    rows = cell.map_errors[cell.map_errors.name.isin(tables.variants(cell))]
    rows = cell.lasting(rows[rows["at"] == rows["at"].max()])
    rows = rows[rows.ema.isin(rows.ema.iloc[:1])]
    if rows.empty:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, group in rows.groupby("name", sort=False):
        curve_ = group.groupby("sigma")["rms"].agg(["mean", "min", "max"])
        colour, marker, style = look(colours, str(name))
        axes.plot(curve_.index, curve_["mean"], linestyle=style, marker=marker, ms=5, mew=0,
                  color=colour, label=name)
        axes.fill_between(curve_.index, curve_["min"], curve_["max"], lw=0, alpha=0.13,
                          color=colours[str(name)])
    axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$",
             ylabel=r"rms distance of $f(x_t, t)$")
    axes.set_title("Distance to the exact consistency map")
    figure.legend(loc="outside right upper")
    return figure, ("Root-mean-square distance of f(x_t, t) to the exact solution of the "
                    "probability-flow ODE; means over seeds, bands from the smallest to the "
                    "largest seed."), list(rows["id"])


def sample_files(cell: Cell) -> list[tuple[str, str, Path]]:
    """(name, id, file) of the samples of one seed, the one for which most variants have them."""
    runs = cell.runs[(cell.runs.role == "variant")
                     & cell.runs.name.isin(tables.variants(cell))]
    best: list[tuple[str, str, Path]] = []
    for _, block in runs.groupby("seed", sort=False):
        files = [(r.name, r.id, cell.study.folder / r.folder / "samples.png")
                 for r in block[["name", "id", "folder"]].itertuples(index=False)]
        files = [f for f in files if _picture(f[2]) is not None]
        best = files if len(files) > len(best) else best
    return best


def _picture(file: Path) -> np.ndarray | None:
    """The picture, or None where there is none that can be read: `Study.problems` names it."""
    try:
        return picture(file, file.name)
    except StudyError:
        return None


def strip_shape(n: int) -> tuple[int, int]:
    """Rows and columns of n sample grids: one row up to four, then two, of up to six each."""
    columns = n if n <= 4 else min(math.ceil(n / 2), 6)
    return math.ceil(n / columns), columns


def strip(figure: Figure | SubFigure, files: list[tuple[str, str, Path]],
          colours: dict[str, Any]) -> None:
    """The samples of one seed side by side, each under its variant's name."""
    grid = figure.subplots(*strip_shape(len(files)), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, _, file) in zip(grid.flat, files, strict=False):
        axes.imshow(_picture(file), cmap="gray", interpolation="nearest")
        axes.set_title(name, fontsize=11, color=colours[name], loc="center")


def samples(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """The strip of samples of one seed."""
    files = sample_files(cell)
    if not files:
        return None
    rows, columns = strip_shape(len(files))
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    strip(figure, files, colours)
    seed = cell.runs.loc[cell.runs["id"] == files[0][1], "seed"].iloc[0]
    return figure, (f"Samples of seed {seed}, every variant from the same fixed noise. "
                    "A picture of single runs, not evidence."), [f[1] for f in files]
