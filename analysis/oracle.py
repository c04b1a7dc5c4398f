"""Figure and tables of fixed points: where methods end without training error, and whether trained
networks get there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import tables, words
from analysis.document import Block, Table
from analysis.levels import rows_of, single, stands_on
from analysis.load import Cell
from analysis.recipes import computed, counterparts, end, kind_of
from analysis.style import GREY, MARKERS, Drawn, plain_log

METRICS = (("w2", "Wasserstein-2 distance,\nunits of the data"),
           ("between", "mass between modes"))
AXES = (("discretization", "grid points $N$"), ("score", "draws $K$ in the score"),
        ("distance", "$c_0$ of the distance"))


def recipes_of(cell: Cell) -> dict[str, Any]:
    """The cell's recipes by name, of variants whose runs have another name too that one alone."""
    return {n: cell.recipes[n] for n in tables.variants(cell)}


def place(factors: dict[str, Any], axis: str) -> float:
    """Where a recipe stands on an axis; nan if nowhere, 0 and infinity for an absolute and a
    squared distance."""
    given = factors.get(axis) or {}
    kind = given.get("kind", "")
    match axis:
        case "discretization":
            return float(given.get("N") or (given["s1"] + 1 if "s1" in given else math.nan))
        case "score":
            return {"single_sample": 1.0}.get(kind, float(given.get("k", math.nan)))
        case _:
            known = {"l1": 0.0, "l2_norm": 0.0, "l2": math.inf}
            return known.get(kind, float(given.get("c0", math.nan)))


def series(recipes: dict[str, Any], axis: str) -> list[list[str]]:
    """Fixed points that differ along one axis only, each run of them in the axis's order."""
    groups: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        if computed(recipe) and not math.isnan(place(recipe["factors"], axis)):
            groups.setdefault(end(recipe["factors"], axis), []).append(name)
    sets = [sorted(g, key=lambda n: place(recipes[n]["factors"], axis)) for g in groups.values()]
    return [g for g in sets if len({place(recipes[n]["factors"], axis) for n in g}) > 1]


def method(factors: dict[str, Any], axis: str = "") -> str:
    """A fixed point in a few words, without what an axis says."""
    exact = kind_of(factors, "score") == "analytic"
    steps = place(factors, "discretization")
    solver, distance = (words.factor_text(factors.get(k)) for k in ("solver", "distance"))
    parts = ["CD" if exact else "CT", solver if exact else "",
             f"K {place(factors, 'score'):g}" if not exact and axis != "score" else "",
             f"N {steps:g}" if axis != "discretization" else "",
             distance if not exact and axis != "distance" else ""]
    return ", ".join(filter(None, parts))


def _value(rows: pd.DataFrame, name: str, quantity: str) -> dict[str, float]:
    return single(rows[rows.name == name], quantity)


def bias(cell: Cell, colours: dict[str, Any]) -> Drawn:
    """Bias of fixed points against N, K and the distance, trained runs beside them."""
    recipes, rows = recipes_of(cell), rows_of(cell, "pushforward")
    recipes = {n: r for n, r in recipes.items() if (rows.name == n).any()}
    columns = [(axis, label, series(recipes, axis)) for axis, label in AXES]
    columns = [c for c in columns if c[2]]
    if not columns:
        return None
    ends = counterparts(recipes)
    figure = Figure(figsize=(4.6 * len(columns) + 0.4, 7.4), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    for j, (axis, label, groups) in enumerate(columns):
        for i, (quantity, unit) in enumerate(METRICS):
            axes = grid[i, j]
            for k, group in enumerate(groups):
                _line(axes, recipes, rows, group, axis, quantity, colours, k)
            drawn = {n for group in groups for n in group}
            for name, fixed in ends.items():
                if fixed in drawn:
                    _trained(axes, _value(rows, name, quantity), name, colours[name],
                             _position(recipes, axis, fixed))
            axes.set(xscale="log", yscale="log")
            if j == 0:
                axes.set_ylabel(unit)
            if i == 1:
                axes.set_xlabel(label)
        _ticks(grid[1, j], recipes, axis, groups)
        if axis != "distance":
            _guide(grid[1, j])
        for axes in grid[:, j]:
            plain_log(axes.yaxis)
        handles, labels = grid[0, j].get_legend_handles_labels()
        below = grid[1, j].get_legend_handles_labels()
        known = dict(zip([*labels, *below[1]], [*handles, *below[0]], strict=True))
        grid[0, j].legend(known.values(), known.keys(), fontsize=7.5, loc="lower center",
                          bbox_to_anchor=(0.5, 1.0), ncols=2 if len(known) > 4 else 1)
    return figure, (
        "Bias of what training would converge to (lines: fixed points, computed on the known "
        "density without a network): how far the prior sent through f is from the data, and the "
        "share of it that lands between modes. Against the grid points N, the posterior draws K "
        "averaged in the score, and the distance, from a norm or absolute value (at the left) to "
        "a mean square (at the right). Open points are trained networks of the same factors, from "
        "the smallest to the largest seed: a point on its line has no training error left. "
        "Dotted: a fall like the root of N or K, which the noise of CT's steps gives. What is 0 "
        "is not drawn. " + stands_on(cell, rows)), None


def _position(recipes: dict[str, Any], axis: str, name: str) -> float:
    """The place on a logarithmic axis: an absolute distance a decade below the smallest c0, a
    squared one a decade above the largest."""
    x = place(recipes[name]["factors"], axis)
    every = [place(r["factors"], axis) for r in recipes.values() if computed(r)]
    finite = [v for v in every if 0 < v < math.inf] or [1.0]
    return min(finite) / 10 if x == 0 else 10 * max(finite) if x == math.inf else x


def _line(axes: Axes, recipes: dict[str, Any], rows: pd.DataFrame, group: list[str], axis: str,
          quantity: str, colours: dict[str, Any], k: int) -> None:
    points = [(_position(recipes, axis, n), _value(rows, n, quantity)["mean"]) for n in group]
    points = [(x, y) for x, y in points if y > 0]
    label = method(recipes[group[0]]["factors"], axis)
    learned = [n for n, fixed in counterparts(recipes).items() if fixed in group]
    if points:
        axes.plot(*zip(*points, strict=True), color=colours[[*learned, group[0]][0]], label=label,
                  marker=MARKERS[k % len(MARKERS)], ms=4.5, mew=0)


def _trained(axes: Axes, entry: dict[str, float], name: str, colour: Any,  # noqa: ANN401
             x: float) -> None:
    if entry["n"] and entry["mean"] > 0:
        reach = [[entry["mean"] - max(entry["low"], 0.0)], [entry["high"] - entry["mean"]]]
        axes.errorbar([x], [entry["mean"]], yerr=reach, color=colour, label=f"{name}, trained",
                      marker="o", ms=8, mfc="white", mew=1.6, elinewidth=1.4, ls="none", zorder=4)


def _ticks(axes: Axes, recipes: dict[str, Any], axis: str, groups: list[list[str]]) -> None:
    names = [n for group in groups for n in group]
    at = {_position(recipes, axis, n): place(recipes[n]["factors"], axis) for n in names}
    text = {0.0: "norm", math.inf: "square"}
    shown: list[float] = []
    for x in sorted(at):  # labels closer than this run into each other
        if not shown or math.log(x / shown[-1]) > 0.055 * math.log(max(at) / min(at)):
            shown.append(x)
    axes.set_xticks(shown, [text.get(at[x], f"{at[x]:g}") for x in shown])
    axes.set_xticks([], minor=True)


def _guide(axes: Axes) -> None:
    """A thin line that falls like the root, through the first point of the first line."""
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    if lines:
        x, y = (np.asarray(v, dtype=float) for v in lines[0].get_data())
        axes.plot(x, y[0] * np.sqrt(x[0] / x), ls=":", lw=1, color=GREY, marker="",
                  label="slope $-1/2$", zorder=1)


def blocks(cell: Cell) -> list[Block]:
    """The table of fixed points, and that of trained variants beside theirs."""
    recipes, rows = recipes_of(cell), rows_of(cell, "pushforward")
    fixed = [n for n, r in recipes.items() if computed(r) and (rows.name == n).any()]
    body = []
    for name in fixed:
        f = recipes[name]["factors"]
        exact = kind_of(f, "score") == "analytic"
        masses = rows[(rows.name == name) & (rows.quantity == "masses")]
        shares = masses.groupby("level")["value"].mean()
        body.append((name, "CD" if exact else "CT", f"{place(f, 'discretization'):g}",
                     "–" if exact else f"{place(f, 'score'):g}",
                     "–" if exact else words.factor_text(f.get("distance")),
                     words.factor_text(f.get("solver")) if exact else "–",
                     *(f"{_value(rows, name, q)['mean']:.4g}" for q, _ in METRICS),
                     " / ".join(f"{v:.3f}" for v in shares) if len(shares) <= 4 else "–"))
    found: list[Block] = []
    if body:
        weights = rows[(rows.quantity == "weights") & rows.name.isin(fixed)]
        true = weights.groupby("level")["value"].mean()
        found.append(Table(
            ("fixed point", "method", "N", "K", "distance", "solver", "W2", "between modes",
             "mass by mode"), body,
            f"{cell.name}: fixed points, without training error. W2 is the Wasserstein-2 distance "
            "of the prior sent through f to the data, in their units; K the posterior draws "
            "averaged in the score."
            + (f" The data's masses are {' / '.join(f'{v:.3f}' for v in true)}."
               if 0 < len(true) <= 4 else "")))
    beside = [(n, e) for n, e in counterparts(recipes).items()
              if e in fixed and _value(rows, n, "w2")["n"]]
    if beside:
        body = []
        for name, fixed_name in beside:
            cells = []
            for quantity, _ in METRICS:
                own, limit = (_value(rows, n, quantity) for n in (name, fixed_name))
                cells += [f"{own['mean']:.4g}" + (f" ({own['low']:.4g} to {own['high']:.4g})"
                                                if own["n"] > 1 else ""),
                          f"{limit['mean']:.4g}",
                          words.signed(own["mean"] - limit["mean"])]
            body.append((name, fixed_name, *cells, f"{_value(rows, name, 'w2')['n']:.0f}"))
        found.append(Table(
            ("trained", "its fixed point", "W2 trained", "W2 fixed point", "difference",
             "between trained", "between fixed point", "difference", "seeds"), body,
            f"{cell.name}: trained networks beside the fixed points of the same data, score, "
            "solver, grid and distance: means over seeds (smallest to largest). A fixed point is "
            "computed: what is left, the difference, is the network's own error. It costs no "
            "images, so the two are not matched."))
    return found
