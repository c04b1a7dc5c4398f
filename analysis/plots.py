"""Figures. Every variant keeps one colour and marker over all of them.

Bands are paired: block effects are removed first, so bands that do not overlap mean a difference at
the 95 % level (see `stats.band`). Curves that the ledger does not prove matched are dashed. Losses
of different variants are never drawn against each other: they are different quantities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from analysis import stats, tables
from analysis.load import Study

INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
MARKERS = "osD^vPX*<>hp"
STYLE = {**sns.axes_style("ticks"), **sns.plotting_context("notebook", font_scale=0.85),
         "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK,
         "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": PALE,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False,
         "font.family": ["DejaVu Sans"], "figure.dpi": 144, "lines.linewidth": 1.8}
SCORE_PANELS = (("variance", "variance of the estimate given $x_t$"),
                ("bias2", "squared bias against the known denoiser"),
                ("distance2", "squared distance of its mean to the\nempirical posterior mean"),
                ("held_out_loss", "denoising loss on held-out data"))
SAMPLES_PER_ROW = 8


@dataclass(frozen=True)
class Picture:
    """A saved figure: its file in the report folder, its caption and the runs it stands on."""

    file: str
    caption: str
    cell: str
    ids: tuple[str, ...]


def palette(study: Study) -> dict[str, Any]:
    """One colour per variant name, in file order."""
    names = list(dict.fromkeys(r["name"] for r in study.recipes if r["role"] == "variant"))
    colours = sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names))
    return dict(zip(names, colours, strict=True))


def draw_all(study: Study, table: pd.DataFrame, folder: Path) -> dict[str, list[Picture]]:
    """Draws every figure that the study has data for; by section: effects, curves, score, samples."""
    colours = palette(study)
    found: dict[str, list[Picture]] = {}
    for cell in study.cells:
        for section, name, draw in (("effects", "effects", _effects), ("curves", "curves", _curves),
                                    ("score", "score_error", _score),
                                    ("map", "map_error", _map), ("samples", "samples", _samples)):
            with matplotlib.rc_context(STYLE):
                drawn = draw(study, table, cell, colours)
                if drawn:
                    figure, caption, ids = drawn
                    file = f"{name}-{cell}.png"
                    save(figure, folder / file)
                    found.setdefault(section, []).append(
                        Picture(file, caption, cell, tuple(dict.fromkeys(ids))))
    return found


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the picture alone."""
    figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", facecolor="white")


def preview(study: Study, table: pd.DataFrame, path: Path) -> bool:
    """One wide picture of the first cell that has comparisons: effects, curve, samples."""
    colours = palette(study)
    for cell in study.cells:
        rows, endpoint = shown(study, table, cell), tables.shown_endpoint(study, cell)
        if endpoint is None or not rows["n"].any():
            continue
        with matplotlib.rc_context(STYLE):
            files = _sample_files(study, cell)
            figure = Figure(figsize=(14, 5.4 + 2.2 * bool(files)), layout="constrained")
            top, *below = figure.subfigures(1 + bool(files), 1, squeeze=False,
                                            height_ratios=[5.4, 2.2][:1 + bool(files)])[:, 0]
            left, right = top.subplots(1, 2, width_ratios=[1, 1])
            forest(left, rows.head(9), colours, endpoint["metric"])
            left.set_title(f"Effects on {tables.title(endpoint['metric'], endpoint['nfe'])}",
                           x=-0.3)
            curve(right, study, cell, endpoint, colours)
            right.legend(fontsize=9, ncols=2)
            right.set_title(f"{_capital(tables.title(endpoint['metric'], endpoint['nfe']))}"
                            " against the budget")
            for part in below:
                strip(part, files, colours)
            save(figure, path)
        return True
    return False


def shown(study: Study, table: pd.DataFrame, cell: str) -> pd.DataFrame:
    """The comparisons of a cell at the endpoint that its table shows."""
    endpoint = tables.shown_endpoint(study, cell)
    rows = table[table["cell"] == cell]
    return tables.select(rows, endpoint) if endpoint else rows.iloc[:0]


# --- effects --------------------------------------------------------------------------------------


def forest(axes: Axes, rows: pd.DataFrame, colours: dict[str, Any], metric: str,
           margin: float = 0.0) -> None:
    """Effects with their 95 % intervals (thick: paired, thin: pooled) and one dot per seed."""
    log, rows = stats.is_log(metric), rows[rows["n"] > 0].reset_index(drop=True)
    if margin:
        axes.axvspan(-margin, margin, color=PALE, alpha=0.6, lw=0, zorder=0)
    axes.axvline(0, color=GREY, lw=1)
    reach = []
    for i, row in rows.iterrows():
        colour = colours[row.variant]
        points = [float(p.split(":")[1]) for p in row["points"].split()]
        axes.plot([row.low_pooled, row.high_pooled], [i, i], color=colour, lw=1, alpha=0.9)
        axes.plot([row.low, row.high], [i, i], color=colour, lw=4.5, alpha=0.35,
                  solid_capstyle="butt")
        axes.plot(points, [i + 0.2] * len(points), "o", ms=3.5, color=colour, alpha=0.75, mew=0)
        axes.plot(row.effect, i, "D", ms=6, color=colour, mec="white", mew=0.8)
        reach += [*points, *(x for x in (row.low_pooled, row.high_pooled) if x == x)]
        wide = max(abs(p - row.effect) for p in points)  # a wild t interval must not set the scale
        reach += [x for x in (row.low, row.high) if abs(x - row.effect) < 3 * wide + 1e-12]
        axes.text(1.02, i, f"{percent_text(row.effect) if log else f'{row.effect:+.3g}'}"
                  f"   {row.n}/{row.planned}", transform=axes.get_yaxis_transform(), va="center",
                  fontsize=9, weight="bold" if row.role == "primary" else None)
    low, high = min([*reach, 0.0]), max([*reach, 0.0])
    pad = 0.08 * (high - low) or 0.1
    axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [f"{r.variant} $-$ {r.baseline}" for r in rows.itertuples()]
    axes.set_yticks(range(len(rows)), labels)
    for label, row in zip(axes.get_yticklabels(), rows.itertuples(), strict=True):
        label.set_weight("bold" if row.role == "primary" else "normal")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if log:
        ends = [stats.percent(x) for x in axes.get_xlim()]
        ticks = [t for t in MaxNLocator(7).tick_values(*ends) if ends[0] <= t <= ends[1]]
        axes.set_xticks([math.log1p(t / 100) for t in ticks], [f"{t:+.3g} %" for t in ticks])
    axes.set_xlabel(("change in " if log else "difference in ") + tables.title(metric)
                    + r"   (better $\leftarrow$ 0 $\rightarrow$ worse)")


def percent_text(effect: float) -> str:
    """A log difference as a signed percentage."""
    value = stats.percent(effect)
    return f"{value:+.{1 if abs(value) < 10 else 0}f} %"


def _effects(study: Study, table: pd.DataFrame, cell: str, colours: dict[str, Any]
             ) -> tuple[Figure, str, list[str]] | None:
    rows, endpoint = shown(study, table, cell), tables.shown_endpoint(study, cell)
    if endpoint is None or not rows["n"].any():
        return None
    figure = Figure(figsize=(9, 1.3 + 0.46 * int((rows["n"] > 0).sum())))
    forest(figure.subplots(), rows, colours, endpoint["metric"],
           float(study.primaries.get(cell, {}).get("margin", 0)))
    ids = tables.select(study.measures[study.measures.cell == cell], endpoint)["id"]
    return figure, ("Diamonds are mean paired differences, small dots single seeds, thick bars "
                    "95 % Student-t intervals (n - 1 degrees of freedom), thin lines 95 % intervals "
                    "from the pooled block + variant residual; a bar that leaves the frame goes on. "
                    "Shaded: the margin within which a difference counts as a tie. At the right, "
                    "the mean effect and the seeds it stands on."), list(ids)


# --- metric against budget ------------------------------------------------------------------------


def curve(axes: Axes, study: Study, cell: str, endpoint: dict[str, Any], colours: dict[str, Any]
          ) -> list[str]:
    """Metric against own + charged images; returns the ids of the runs drawn."""
    names = tables.variants(study, cell)
    where = {k: v for k, v in endpoint.items() if k != "at"}
    rows = tables.select(study.measures[study.measures.cell == cell], where)
    gone = study.runs[study.runs.outcome == "diverged"]["id"]
    rows = rows[rows.name.isin(names) & ~rows["id"].isin(gone) & rows["value"].notna()
                & rows.images_total.notna()]
    if rows.empty:
        return []
    rows = rows[rows.identity == rows.identity.mode()[0]]
    log = stats.is_log(endpoint["metric"])
    back: Callable[[Any], Any] = np.exp if log else np.asarray
    lines: dict[str, list[tuple[float, ...]]] = {n: [] for n in names}
    for _, group in rows.groupby("at"):
        g = group.assign(value=stats.transform(endpoint["metric"], group["value"].to_numpy()))
        wide = g.pivot(index="seed", columns="name", values="value")
        half = stats.band(stats.layout(wide.to_numpy()))
        x = group.groupby("name")["images_total"].mean()
        for j, name in enumerate(wide.columns):
            mean = float(wide[name].mean())
            lines[str(name)].append((float(x[name]), mean, mean - half[j], mean + half[j]))
    last = {n: points[-1][0] for n, points in lines.items() if points}
    common = pd.Series(last).mode()[0]
    for i, name in enumerate(names):
        if not lines[name]:
            continue
        x, mean, low, high = np.array(lines[name]).T
        style = "-" if last[name] == common else "--"
        axes.plot(x, back(mean), style, marker=MARKERS[i % len(MARKERS)], ms=5, mew=0,
                  color=colours[name], label=name + ("" if style == "-" else " (not matched)"))
        axes.fill_between(x, back(low), back(high), color=colours[name], alpha=0.13, lw=0)
        own = rows[rows.name == name]
        axes.plot(own.images_total, own["value"], ".", ms=3, color=colours[name], alpha=0.55)
    floor = rows["floor"].mean()
    if floor == floor and (floor > 0 or not log):
        axes.axhline(floor, color=GREY, lw=1, ls=":")
        axes.annotate("real against real", (1, floor), xycoords=axes.get_yaxis_transform(),
                      xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8,
                      color=GREY)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlim(left=0)
    axes.set_xlabel("training images, own + charged")
    return list(rows["id"])


def _curves(study: Study, table: pd.DataFrame, cell: str, colours: dict[str, Any]
            ) -> tuple[Figure, str, list[str]] | None:
    main = tables.shown_endpoint(study, cell)
    if main is None:
        return None
    rows = study.measures[(study.measures.cell == cell) & (study.measures.role == "variant")
                          & study.measures.ema.isin([main["ema"], ""])]
    rows = rows[rows.reference.isin([main["reference"], ""]) | (main["reference"] == "")]
    keys = rows.groupby(["metric", "nfe", "ema", "reference"], sort=False, dropna=False)
    ends = [dict(zip(keys.keys, key, strict=True)) for key, g in keys if g["at"].nunique() > 1]
    if not ends:
        return None
    columns = min(len(ends), 2)
    tall = math.ceil(len(ends) / columns)
    figure = Figure(figsize=(4.9 * columns + 0.4, 3.7 * tall), layout="constrained")
    grid, ids = figure.subplots(tall, columns, squeeze=False).flat, []
    for axes, end in zip(grid, ends, strict=False):
        ids += curve(axes, study, cell, end, colours)
        axes.set_title(_capital(tables.title(end["metric"], end["nfe"])))
    for axes in list(grid)[len(ends):] if False else list(figure.axes)[len(ends):]:
        axes.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure, ("Lines are means over seeds (geometric where the axis is logarithmic), small "
                    "dots single runs. Bands are paired: with block effects removed, bands that do "
                    "not overlap differ at the 95 % level; they need three seeds. Charged images "
                    "are those of sources counted against the variant's own budget; a dashed curve "
                    "ends at another sum and is not matched."), ids


# --- score error, map error, samples --------------------------------------------------------------


def _score(study: Study, table: pd.DataFrame, cell: str, colours: dict[str, Any]
           ) -> tuple[Figure, str, list[str]] | None:
    rows = study.score_errors[study.score_errors.cell == cell]
    rows = rows[rows.name.isin(list(colours))]
    panels = [(k, label) for k, label in SCORE_PANELS if rows[k].notna().any()]
    if rows.empty or not panels:
        return None
    scores = {r["name"]: json.dumps(r["factors"].get("score"), sort_keys=True)
              for r in study.recipes if r["cell"] == cell and r["name"] in colours
              and "score" not in r.get("ignored", [])}
    figure = Figure(figsize=(4.3 * len(panels) + 2, 3.9), layout="constrained")
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
                      color=colours[str(name)], label=text + (": 0" if zero else ""))
            axes.fill_between(positive.index, positive["min"], positive["max"], alpha=0.15, lw=0,
                              color=colours[str(name)])
        posterior = rows.groupby("sigma")["posterior_variance"].mean()
        axes.plot(posterior.index, posterior.where(posterior > 0), color=INK, lw=1, ls="--",
                  label=r"posterior variance $E\,\mathrm{Tr\,Cov}[x|x_t]$")
        if rows.t_star.notna().any():
            axes.axvline(rows.t_star.mean(), color=GREY, lw=1.2, ls=":", label="$t^*$")
        axes.set(xscale="log", yscale="log", xlabel=r"noise level $\sigma$")
        axes.set_title(_capital(label), fontsize=10)
    grid[0].set_ylabel(f"denoiser units, summed over d = {rows.dimension.iloc[0]:.0f}")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    star = rows.t_star.mean()
    caption = ("Error of each variant's estimate D^ of E[x | x_t]; divide by sigma^2 for velocity "
               "units, by sigma^4 for score units. Measured once per data, score and source. Values "
               "at or below 0 (unbiased estimates of something near 0) cannot be drawn.")
    if star == star:
        caption += (f" t* = {star:.3g} is the largest sigma at which the posterior over the "
                    "training set is still the one image that made x_t (mean weight .99 or more): "
                    "below it no score but a trained one has any error.")
    return figure, caption, list(rows["id"])


def _map(study: Study, table: pd.DataFrame, cell: str, colours: dict[str, Any]
         ) -> tuple[Figure, str, list[str]] | None:
    rows = study.map_errors[(study.map_errors.cell == cell)
                            & study.map_errors.name.isin(tables.variants(study, cell))]
    gone = study.runs[study.runs.outcome == "diverged"]["id"]
    rows = rows[(rows["at"] == rows["at"].max()) & ~rows["id"].isin(gone)]
    rows = rows[rows.ema.isin(rows.ema.iloc[:1])]
    if rows.empty:
        return None
    figure = Figure(figsize=(7, 3.8), layout="constrained")
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


def _sample_files(study: Study, cell: str) -> list[tuple[str, str, Path]]:
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


def _samples(study: Study, table: pd.DataFrame, cell: str, colours: dict[str, Any]
             ) -> tuple[Figure, str, list[str]] | None:
    files = _sample_files(study, cell)
    if not files:
        return None
    rows = math.ceil(len(files) / SAMPLES_PER_ROW)
    figure = Figure(figsize=(1.55 * min(len(files), SAMPLES_PER_ROW), 1.9 * rows),
                    layout="constrained")
    strip(figure, files, colours)
    seed = study.runs.loc[study.runs["id"] == files[0][1], "seed"].iloc[0]
    return figure, (f"Samples of seed {seed}, every variant from the same fixed noise. "
                    "A picture of single runs, not evidence."), [f[1] for f in files]


def _thousands(value: float, _: int) -> str:
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
