"""Figures. Every variant keeps one colour and marker over all of them.

Bands are paired: block effects are removed first, so bands that do not overlap mean a difference
at the 95 % level (see `stats.band`). Curves that the ledger does not prove matched are dashed.
Losses of different variants are never drawn against each other: they are different quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis import instruments, oracle, probes, shared, stats, tables, words
from analysis.files import REPORTED, WITH_FLOOR
from analysis.identities import apart, points
from analysis.load import Cell, Study
from analysis.style import GREY, PALE, STYLE, Drawn, capital, look, palette, panels, save

WIDE_TICKS = (-93.75, -87.5, -75, -50, 0, 100, 300, 700, 1500)  # percent: powers of two
DRAWN = 40  # effects; more stand in comparisons.csv
FLOOR_WITHIN = 4  # times the smallest value: a floor farther below is named, not drawn


@dataclass(frozen=True)
class Picture:
    """A saved figure: its file in the report folder, its caption and the runs it stands on."""

    file: str
    caption: str
    cell: Cell
    ids: list[str] | None


def draw_all(study: Study, table: pd.DataFrame, folder: Path) -> dict[str, list[Picture]]:
    """Draws every figure that the study has data for, by kind (effects, curves, ...)."""
    colours = palette(study)
    found: dict[str, list[Picture]] = {}
    for cell in study.cells:
        for name, draw in (("effects", partial(_effects, table)), ("curves", _curves),
                           ("score_error", probes.score), ("map_error", probes.map_error),
                           ("gradient_noise", instruments.noise),
                           ("gradient_parts", instruments.parts),
                           ("gradient_step", instruments.step),
                           ("gradient_cosine", instruments.cosine),
                           ("gradient_slopes", instruments.slopes),
                           ("gradient_rounding", instruments.rounding),
                           ("trajectories", instruments.ends), ("drift", instruments.drift),
                           ("fixed_points", oracle.bias), ("samples", probes.samples)):
            with matplotlib.rc_context(STYLE):
                drawn = draw(cell, colours)
                if drawn:
                    figure, caption, ids = drawn
                    file = f"{name}-{cell.name}.png"
                    save(figure, folder / file)
                    found.setdefault(name, []).append(
                        Picture(file, caption, cell, ids))
    return found


def preview(study: Study, table: pd.DataFrame, path: Path) -> None:
    """One wide picture of the first cell that has comparisons: effects, curve, samples."""
    colours = palette(study)
    for cell in study.cells:
        rows, endpoint = shown(table, cell)
        if not rows["n"].any():
            continue
        with matplotlib.rc_context(STYLE):
            files = probes.sample_files(cell)
            tall = [5.4, *([2.9 * probes.strip_shape(len(files))[0]] if files else [])]
            figure = Figure(figsize=(14, sum(tall)), layout="constrained")
            top, *below = figure.subfigures(len(tall), 1, squeeze=False, height_ratios=tall)[:, 0]
            left, right = top.subplots(1, 2, width_ratios=[1, 1])
            forest(left, rows.head(12), colours, endpoint["metric"])
            left.set_title(f"Effects on {tables.title(endpoint['metric'], endpoint['nfe'])}",
                           x=-0.3)
            curve(right, cell, endpoint, colours)
            right.legend(fontsize=9, ncols=4 if len(colours) > 6 else 6, loc="upper center",
                         bbox_to_anchor=(0.5, -0.11), columnspacing=1.2, handlelength=1.6)
            right.set_title(f"{capital(tables.title(endpoint['metric'], endpoint['nfe']))}"
                            " against the budget")
            for part in below:
                probes.strip(part, files, colours)
            save(figure, path)
        return


def shown(table: pd.DataFrame, cell: Cell) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The comparisons of a cell at the endpoint that its table shows, and that endpoint; none and
    {} where it shows none."""
    rows, endpoint = table[table["cell"] == cell.name], tables.shown_endpoint(cell)
    return (tables.select(rows, endpoint), endpoint) if endpoint else (rows.iloc[:0], {})


# --- effects -------------------------------------------------------------------------------------


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
        seeds = [*points(row).values()]
        axes.plot([row.low_pooled, row.high_pooled], [i, i], color=colour, lw=1, alpha=0.9)
        axes.plot([row.low, row.high], [i, i], color=colour, lw=4.5, alpha=0.35,
                  solid_capstyle="butt")
        axes.plot(seeds, [i + 0.2] * len(seeds), "o", ms=3.5, color=colour, alpha=0.75, mew=0)
        axes.plot(row.effect, i, "D", ms=6, color=colour, mec="white", mew=0.8)
        reach += [*seeds, *(x for x in (row.low_pooled, row.high_pooled) if x == x)]
        wide = max(abs(x - row.effect) for x in seeds)  # a wild t interval must not set the scale
        reach += [x for x in (row.low, row.high) if abs(x - row.effect) < 3 * wide + 1e-12]
        axes.text(1.02, i, f"{words.change(row.effect, log)}"
                  f"   {row.n}/{row.planned}", transform=axes.get_yaxis_transform(), va="center",
                  fontsize=9, weight="bold" if row.role == "primary" else None)
    low, high = min([*reach, 0.0]), max([*reach, 0.0])
    pad = 0.08 * (high - low) or 0.1
    axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    labels = [f"{r.variant} $-$ {r.baseline}" + f"\n{r.stands_on}" * bool(r.stands_on)
              for r in rows.itertuples()]
    axes.set_yticks(range(len(rows)), labels)
    for label, row in zip(axes.get_yticklabels(), rows.itertuples(), strict=True):
        label.set_weight("bold" if row.role == "primary" else "normal")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    if log:
        ends = [stats.percent(x) for x in axes.get_xlim()]
        wide = axes.get_xlim()[1] - axes.get_xlim()[0] > 0.9
        ticks = WIDE_TICKS if wide else MaxNLocator(7).tick_values(*ends)
        ticks = [t for t in ticks if ends[0] <= t <= ends[1]]
        axes.set_xticks([math.log1p(t / 100) for t in ticks],
                        [f"{t:+.3g} %".replace("-", "\u2212") if t else "0" for t in ticks])
    what = (f"change in {tables.title(metric)}, logarithmic axis" if log else
            f"{'shortfall' if metric in stats.BETTER_HIGH else 'difference'} in "
            f"{tables.title(metric)}")
    axes.set_xlabel(what + r"   (better $\leftarrow$ 0 $\rightarrow$ worse)")


def _effects(table: pd.DataFrame, cell: Cell, colours: dict[str, Any]) -> Drawn:
    rows, endpoint = shown(table, cell)
    rows = rows[rows["n"] > 0].head(DRAWN)
    if rows.empty:
        return None
    figure = Figure(figsize=(9, 1.3 + 0.46 * len(rows)))
    forest(figure.subplots(), rows, colours, endpoint["metric"],
           float(cell.primary.get("margin", 0)))
    ids = tables.select(cell.measures, endpoint)["id"]
    return figure, ("Diamonds are mean paired differences, small dots single seeds, thick bars "
                    "95 % Student-t intervals (n - 1 degrees of freedom), thin lines 95 % "
                    "intervals from the pooled block + variant residual; a bar that leaves the "
                    "frame goes on. Shaded: the margin within which a difference counts as a tie. "
                    "At the right, the mean effect and the seeds it stands on."), list(ids)


# --- metric against budget -----------------------------------------------------------------------


def curve(axes: Axes, cell: Cell, endpoint: dict[str, Any], colours: dict[str, Any]
          ) -> list[str]:
    """Metric against own + charged images; returns the ids of the runs drawn."""
    names = [n for n in tables.variants(cell) if n not in cell.fixed]
    where = {k: v for k, v in endpoint.items() if k != "at"}
    rows = tables.select(cell.measures, where)
    rows = cell.lasting(rows[rows.name.isin(names) & rows["value"].notna()
                              & rows.images_total.notna()])
    if rows.empty:
        return []
    what = rows.identity.mode()[0]
    if on := apart(rows.identity)[what]:
        axes.annotate(f"on {on} alone", (0.01, 0.98), xycoords="axes fraction", va="top",
                      fontsize=8, color=GREY)
    rows = rows[rows.identity == what]
    log, one = stats.is_log(endpoint["metric"]), shared.networks(cell)
    back = partial(stats.restore, endpoint["metric"])
    lines: dict[str, list[tuple[float, ...]]] = {n: [] for n in names}
    for _, group in rows.groupby("at"):
        g = group.assign(value=stats.transform(endpoint["metric"], group["value"].to_numpy()))
        wide = g.pivot(index="seed", columns="name", values="value")
        own = ~wide.columns.isin(one)  # what all seeds share has no residual to be pooled
        half = np.full(len(own), np.nan)
        half[own] = stats.band(stats.layout(wide.loc[:, own].to_numpy()))
        x = group.groupby("name")["images_total"].mean()
        for j, name in enumerate(wide.columns):
            mean = float(wide[name].mean())
            lines[str(name)].append((float(x[name]), mean, mean - half[j], mean + half[j]))
    last = {n: points[-1][0] for n, points in lines.items() if points}
    common = pd.Series(last).mode()[0]
    for name in (n for n in names if lines[n]):
        x, mean, low, high = np.array(lines[name]).T
        colour, marker, style = look(colours, name)
        matched = last[name] == common
        axes.plot(x, back(mean), linestyle=style if matched else "--", marker=marker, ms=5, mew=0,
                  color=colour, label=name + ("" if matched else " (not matched)"))
        axes.fill_between(x, back(low), back(high), color=colours[name], alpha=0.1, lw=0)
        own = rows[rows.name == name]
        axes.plot(own.images_total, own["value"], ".", ms=3, color=colours[name], alpha=0.55)
    floor = rows["floor"].mean()
    if floor > rows["value"].min() / FLOOR_WITHIN or (not log and floor == floor):
        axes.axhline(floor, color=GREY, lw=1, ls=":")
        axes.annotate(f"real against real: {floor:.3g}", (1, floor), ha="right", fontsize=8,
                      xycoords=axes.get_yaxis_transform(), xytext=(0, 3), color=GREY,
                      textcoords="offset points")
    elif floor == floor:  # far below: drawing it would flatten the curves
        axes.annotate(f"real against real: {floor:.3g}, below the frame", (0.01, 0.02),
                      xycoords="axes fraction", fontsize=8, color=GREY)
    elif endpoint["metric"] in WITH_FLOOR:
        axes.annotate(words.NO_FLOOR, (0.01, 0.02), xycoords="axes fraction", fontsize=8,
                      color=GREY)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    first, end = rows.images_total.min(), rows.images_total.max()
    axes.set_xlim(max(first - 0.06 * (end - first), 0) if end > first else 0)
    axes.set_xlabel("training images, own + charged")
    return list(rows["id"])


def _curves(cell: Cell, colours: dict[str, Any]) -> Drawn:
    main = tables.shown_endpoint(cell)
    if main is None:
        return None
    rows = cell.measures
    rows = rows[(rows.role == "variant") & ~rows.name.isin(cell.fixed)
                & rows.ema.isin([main["ema"], ""]) & ~rows.metric.isin(REPORTED)]
    rows = rows[rows.reference.isin([main["reference"], ""]) | (main["reference"] == "")]
    keys = rows.groupby(["metric", "nfe", "ema", "reference"], sort=False, dropna=False)
    ends = [dict(zip(keys.keys, key, strict=True)) for key, g in keys if g["at"].nunique() > 1]
    if not ends:
        return None
    columns = min(len(ends), 2)
    (figure, grid), ids = panels(len(ends), columns, 4.9 * columns + 0.4, 3.7), []
    for axes, end in zip(grid, ends, strict=True):
        ids += curve(axes, cell, end, colours)
        axes.set_title(capital(tables.title(end["metric"], end["nfe"])))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure, ("Lines are means over seeds (geometric where the axis is logarithmic), small "
                    "dots single runs. Bands are paired (block effects removed, residual variance "
                    "pooled over variants): variants whose bands do not overlap differ at the "
                    "95 % level. They need three seeds. Charged "
                    "images are those of sources counted against the variant's own budget; a "
                    "dashed curve ends at another sum and is not matched. "
                    + words.seen(cell, rows)).rstrip(), ids
