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
from PIL import Image

from analysis import tables
from analysis.load import Study
from analysis.style import GREY, INK, MARKERS, Drawn, capital

SCORE_PANELS = (("variance", "variance of the estimate given $x_t$"),
                ("bias2", "squared bias against the\nknown denoiser"),
                ("distance2", "squared distance of its mean to\nthe empirical posterior mean"),
                ("held_out_loss", "denoising loss on held-out data"))
SAMPLES_PER_ROW = 8


def score(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Variance and error of each score's estimate against sigma, one panel per quantity."""
    rows = study.score_errors[study.score_errors.cell == cell]
    rows = rows[rows.name.isin(list(colours))]
    panels = [(k, label) for k, label in SCORE_PANELS if rows[k].notna().any()]
    if rows.empty or not panels:
        return None
    scores = {r["name"]: json.dumps(r["factors"].get("score"), sort_keys=True)
              for r in study.recipes if r["cell"] == cell and r["name"] in colours
              and "score" not in r.get("ignored", [])}
    figure = Figure(figsize=(3.7 * len(panels) + 0.6, 4.1), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (key, label) in zip(grid, panels, strict=True):
        for name, group in rows.groupby("name", sort=False):
            sharing = [n for n, s in scores.items() if s == scores.get(name)] or [name]
            kind = json.loads(scores.get(str(name), "null") or "null") or {}
            text = f"{kind.get('kind', name)} ({', '.join(sharing)})"
            curve_ = group.groupby("sigma")[key].agg(["mean", "min", "max"])
            positive = curve_.where(curve_ > 0)
            zero = curve_["mean"].eq(0).all()
            axes.plot(positive.index, positive["mean"], marker="o", ms=4, mew=0,
                      color=colours[str(name)], label=text + (": variance 0" if zero else ""))
            axes.fill_between(positive.index, positive["min"], positive["max"], alpha=0.15, lw=0,
                              color=colours[str(name)])
        posterior = rows.groupby("sigma")["posterior_variance"].mean()
        axes.plot(posterior.index, posterior.where(posterior > 0), color=INK, lw=1, ls="--",
                  label=r"posterior variance $E\,\mathrm{Tr\,Cov}[x\,|\,x_t]$")
        if rows.t_star.notna().any():
            axes.axvline(rows.t_star.mean(), color=GREY, lw=1.2, ls=":", label="$t^*$")
        axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$")
        top = np.nanmax([rows[key].max(), posterior.max()])
        if top > 0:  # what lies below is rounding
            axes.set_ylim(max(axes.get_ylim()[0], 1e-6 * top), 3 * top)
        axes.set_title(capital(label), fontsize=10)
    grid[0].set_ylabel(f"denoiser units, summed over d = {rows.dimension.iloc[0]:.0f}")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    star = rows.t_star.mean()
    caption = ("Error of each variant's estimate D^ of E[x | x_t]; divide by sigma^2 for velocity "
               "units, by sigma^4 for score units. Measured once per data, score and source. "
               "Not drawn: values at or below 0 (unbiased estimates of nearly 0) or below a "
               "millionth of the largest.")
    if star == star:
        caption += (f" t* = {star:.3g} is the largest sigma at which the posterior over the "
                    "training set is still the one image that made x_t (mean weight .99 or more): "
                    "below it only a trained score differs from that image.")
    return figure, caption, list(rows["id"])


def map_error(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """Distance of each variant to the exact consistency map against sigma."""
    rows = study.map_errors[(study.map_errors.cell == cell)
                            & study.map_errors.name.isin(tables.variants(study, cell))]
    gone = study.runs[study.runs.outcome == "diverged"]["id"]
    rows = rows[(rows["at"] == rows["at"].max()) & ~rows["id"].isin(gone)]
    rows = rows[rows.ema.isin(rows.ema.iloc[:1])]
    if rows.empty:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, group) in enumerate(rows.groupby("name", sort=False)):
        curve_ = group.groupby("sigma")["rms"].agg(["mean", "min", "max"])
        axes.plot(curve_.index, curve_["mean"], marker=MARKERS[i % len(MARKERS)], ms=5, mew=0,
                  color=colours[str(name)], label=name)
        axes.fill_between(curve_.index, curve_["min"], curve_["max"], lw=0, alpha=0.13,
                          color=colours[str(name)])
    axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$",
             ylabel=r"rms distance of $f(x_t, t)$")
    axes.set_title("Distance to the exact consistency map")
    figure.legend(loc="outside right upper")
    return figure, ("Root-mean-square distance of f(x_t, t) to the exact solution of the "
                    "probability-flow ODE; means over seeds, bands from the smallest to the "
                    "largest seed."), list(rows["id"])


def sample_files(study: Study, cell: str) -> list[tuple[str, str, Path]]:
    """(name, id, file) of the samples of one seed, the one for which most variants have them."""
    runs = study.runs[(study.runs.cell == cell) & (study.runs.role == "variant")
                      & study.runs.name.isin(tables.variants(study, cell))]
    best: list[tuple[str, str, Path]] = []
    for _, block in runs.groupby("seed", sort=False):
        files = [(r.name, r.id, study.folder / r.folder / "samples.png")
                 for r in block[["name", "id", "folder"]].itertuples(index=False)]
        files = [f for f in files if f[2].is_file()]
        best = files if len(files) > len(best) else best
    return best


def strip(figure: Figure | SubFigure, files: list[tuple[str, str, Path]],
          colours: dict[str, Any]) -> None:
    """The samples of one seed side by side, each under its variant's name."""
    columns = min(len(files), SAMPLES_PER_ROW)
    grid = figure.subplots(math.ceil(len(files) / columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, _, file) in zip(grid.flat, files, strict=False):
        with Image.open(file) as image:
            axes.imshow(np.asarray(image), cmap="gray", interpolation="nearest")
        axes.set_title(name, fontsize=9.5, color=colours[name], loc="center")


def samples(study: Study, _: pd.DataFrame, cell: str, colours: dict[str, Any]) -> Drawn:
    """The strip of samples of one seed."""
    files = sample_files(study, cell)
    if not files:
        return None
    rows = math.ceil(len(files) / SAMPLES_PER_ROW)
    figure = Figure(figsize=(1.55 * min(len(files), SAMPLES_PER_ROW), 1.9 * rows),
                    layout="constrained")
    strip(figure, files, colours)
    seed = study.runs.loc[study.runs["id"] == files[0][1], "seed"].iloc[0]
    return figure, (f"Samples of seed {seed}, every variant from the same fixed noise. "
                    "A picture of single runs, not evidence."), [f[1] for f in files]
