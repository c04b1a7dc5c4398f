"""Comparisons and summaries, as frames; every row keeps to one metric identity.

A comparison is variant minus baseline over the blocks of one cell. Primary is the pair that the
study names, named are further ones that it was made for (`compare`), whatever they differ in.
Secondary are every other variant against the primary's baseline, and every pair whose complete
factors differ in exactly one key: these say which factor causes what. Where that key is the
primary's, the pair is oriented like the primary; elsewhere it is the later in the file minus the
earlier. Charging moves images from a run's budget to its sources: the budget differs if own +
charged images do, and where only the own images do, so does its split, a second factor that is
borne only against the primary's two sides. Tested are the pairs on the primary's endpoint; all
other endpoints (metric, NFE, point, EMA, reference) are described, without verdicts. A side that
is one network in all seeds (see analysis.shared) leaves an effect and its interval, and no test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import shared, stats
from analysis.files import REPORTED
from analysis.identities import PATHS, apart, points, settings, written
from analysis.load import Cell, Study
from analysis.recipes import SPLIT, along, computed, counterparts, differing
from analysis.records import number

METRICS = {"fid": "FID", "kid": "KID", "sliced_wasserstein": "sliced Wasserstein distance",
           "mode_mass_between": "mass between modes", "mode_mass_tv": "mode-share error (TV)",
           "map_error": "consistency-map error", "memorisation": "memorisation",
           "class_tv": "class-share error (TV)", "trajectory_error": "trajectory error",
           "pushforward_w2": "one-step Wasserstein-2 distance",
           "pushforward_between": "one-step mass between modes"}
USES = {"fid": ("nfe", "ema", "reference"), "kid": ("nfe", "ema", "reference"),
        **dict.fromkeys(("map_error", "trajectory_error", "pushforward_w2", "pushforward_between"),
                        ("ema",))}  # what else identifies a metric's endpoint; others: nfe and ema
MEANT = {"trajectories": "trajectory_error", "coverage": "recall", "pushforward": "pushforward_w2"}
ENDPOINT = ("metric", "nfe", "at", "ema", "reference")
STEPS = {1: "one-step ", 2: "two-step "}

COMPARISON_COLUMNS = (
    "cell", "variant", "baseline", "differs", *ENDPOINT, "n", "planned", "diverged", "effect",
    "low", "high", "low_pooled", "high_pooled", "p", "p_holm", "sign_flip_p", "verdict", "matched",
    "matched_with_sources", "role", "mean_variant", "mean_baseline", "percent",
    "percent_low", "percent_high", "sd", "diverged_variant", "diverged_baseline",
    "equal_variances_p", "family", "points", "identity", "shared", "stands_on")
FAMILY = ("named", "secondary")  # Holm's


@dataclass(frozen=True)
class Pair:
    """A comparison to make; differs: the top-level factors that tell the two apart, with the
    amounts of a budget split in brackets.
    """

    variant: str
    baseline: str
    differs: tuple[str, ...]
    role: str


def title(metric: str, nfe: float = math.nan) -> str:
    """A metric's name in prose, e.g. "one-step FID"."""
    steps = "" if math.isnan(nfe) else STEPS.get(int(nfe), f"{int(nfe)}-evaluation ")
    return steps + METRICS.get(metric, metric.replace("_", " "))


def described(endpoint: dict[str, Any]) -> str:
    """An endpoint in prose."""
    parts = [f"at {100 * endpoint['at']:g} % of the budget",
             f"EMA {endpoint['ema']}" if endpoint["ema"] else "",
             f"against {endpoint['reference']} data" if endpoint["reference"] else ""]
    return ", ".join([title(endpoint["metric"], endpoint["nfe"]), *filter(None, parts)])


def headings(columns: list[tuple[str, str]]) -> list[str]:
    """Short names for (metric, identity) columns; where two would read alike, with what tells
    their identities apart."""
    short = []
    for metric, what in columns:
        keys = settings(what)
        path = PATHS.get(keys.get("along", ""), "")
        told = (METRICS.get(metric, metric), f"{path} path" * bool(path),
                f"{keys['nfe']} NFE" if "nfe" in keys else "",
                keys.get("reference", "").replace("_", "-"))
        short.append(", ".join(filter(None, told)))
    alike = [[w for other, (_, w) in zip(short, columns, strict=True) if other == h]
             for h in short]
    return [h if len(whats) == 1 else f"{h}, {apart(whats)[what]}"
            for h, whats, (_, what) in zip(short, alike, columns, strict=True)]


def primary_endpoint(cell: Cell) -> dict[str, Any] | None:
    """The cell's primary metric, nfe, at, ema and reference; blank where the metric has none."""
    p = cell.primary
    if not p:
        return None
    metric = MEANT.get(p["metric"], p["metric"])  # a study names a measurement by its kind
    uses = USES.get(metric, ("nfe", "ema"))
    return {"metric": metric, "at": number(p["at"]),
            "nfe": number(p["nfe"]) if "nfe" in uses else math.nan,
            "ema": str(p["ema"]) if "ema" in uses else "",
            "reference": (p["reference"] or "") if "reference" in uses else ""}


def select(frame: pd.DataFrame, endpoint: dict[str, Any]) -> pd.DataFrame:
    """The rows of `frame` at an endpoint (nan matches nan)."""
    keep = np.ones(len(frame), dtype=bool)
    for key, value in endpoint.items():
        blank = isinstance(value, float) and math.isnan(value)
        keep &= (frame[key].isna() if blank else frame[key] == value).to_numpy(dtype=bool)
    return frame[keep]


def shown_endpoint(cell: Cell) -> dict[str, Any] | None:
    """The endpoint that a cell's table shows: the primary's, or where none is declared the first
    metric that its variants have, at the last point.
    """
    if cell.primary:
        return primary_endpoint(cell)
    rows = cell.measures
    rows = rows[(rows.role == "variant") & ~rows.metric.isin(REPORTED)]
    if rows.empty:
        return None
    last = rows[(rows["metric"] == rows["metric"].iloc[0]) & (rows["at"] == rows["at"].max())]
    return {k: last[k].iloc[0] for k in ENDPOINT} if len(last) else None


def variants(cell: Cell) -> list[str]:
    """The cell's variants in file order, names that mean the same runs counted once."""
    return [name for name, kept in _names(cell).items() if name == kept]


def _names(cell: Cell) -> dict[str, str]:
    """The cell's variants in file order, each with the name that its runs go by.

    Of such names the primary's own stays, else one that `compare` names, else the first.
    """
    ids: dict[str, tuple[str, ...]] = {}
    for name, group in cell.runs[cell.runs.role == "variant"].groupby("name", sort=False):
        ids[str(name)] = tuple(group["id"])
    primary, kept = cell.primary, {}
    sides = [primary[side] for side in ("variant", "against") if side in primary]
    for name in (*reversed(ids), *(n for pair in cell.study.compare for n in pair), *sides):
        if name in ids:
            kept[ids[name]] = name
    return {name: kept[key] for name, key in ids.items()}


def pairs(cell: Cell) -> list[Pair]:
    """The comparisons to make in a cell; each unordered pair once. A fixed point is compared with
    the variants that it is the end of and with no other; where the primary has one too, these are
    secondary, elsewhere they are not tested."""
    kept, names = _names(cell), variants(cell)
    recipes, primary = cell.recipes, cell.primary
    sides = (primary.get("variant"), primary.get("against"))
    made: dict[frozenset[str], Pair] = {}

    def add(variant: str, baseline: str, role: str) -> None:
        if variant != baseline and {variant, baseline} <= set(names):
            made.setdefault(frozenset((variant, baseline)), Pair(
                variant, baseline, differing(recipes, variant, baseline), role))

    trained = [n for n in names if not computed(recipes[n])]
    learned = bool(primary) and any(computed(recipes[n]) for n in sides)
    if primary:
        add(*sides, "primary")
    for pair in cell.study.compare:
        add(*(kept.get(n, n) for n in pair), "named")
    if primary:
        for name in () if learned else trained:
            add(name, sides[1], "secondary")
    for variant, fixed in counterparts(recipes).items():
        add(variant, fixed, "secondary" if learned else "descriptive")
    for i, later in enumerate(trained):
        for earlier in trained[:i]:
            factors = [f for f in differing(recipes, later, earlier)
                       if not (f.startswith(SPLIT) and {later, earlier} & {*sides})]
            if len(factors) == 1:
                its = primary and tuple(factors) == differing(recipes, *sides)
                at = [along(recipes, sides, factors[0], n) if its else 0.0
                      for n in (later, earlier)]
                add(*(later, earlier) if at[0] >= at[1] else (earlier, later), "secondary")
    return list(made.values())


def comparisons(study: Study) -> pd.DataFrame:
    """All comparisons at all endpoints: COMPARISON_COLUMNS, the primary's endpoint first.

    effect > 0 means worse than the baseline. The primary is tested by itself; Holm's family is
    the named and the secondary comparisons, over all cells.
    """
    rows: list[dict[str, Any]] = []
    for cell in study.cells:
        endpoint = primary_endpoint(cell)
        made, names = pairs(cell), variants(cell)
        frame, runs = cell.measures, cell.runs[cell.runs.role == "variant"]
        frame = frame[frame.name.isin(names) & (frame.role == "variant")
                      & ~frame.metric.isin(REPORTED)]
        planned = runs.pivot(index="seed", columns="name", values="id").notna()
        gone = runs.pivot(index="seed", columns="name", values="outcome") == "diverged"
        one = shared.networks(cell)
        groups = [(dict(zip(ENDPOINT, key[:-1], strict=True)), key[-1], group) for key, group
                  in frame.groupby([*ENDPOINT, "identity"], sort=False, dropna=False)]
        if endpoint and not len(select(frame, endpoint)):
            groups.insert(0, (endpoint, "", frame.iloc[:0]))
        for where, what, group in groups:
            on = apart(select(frame, where).identity).get(what, "")
            rows += _group(made, planned, gone,
                           where | {"cell": cell.name, "identity": what, "stands_on": on}, group,
                           cell.fixed, one, tested=_same(where, endpoint))
    table = pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))
    _judge(study, table)
    order = table.role.map({"primary": 0, "named": 1, "secondary": 2}).fillna(3)
    return table.iloc[np.argsort(order.to_numpy(), kind="stable")].reset_index(drop=True)


def _same(a: dict[str, Any], b: dict[str, Any] | None) -> bool:
    return b is not None and all(
        a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in ENDPOINT)


def _group(made: list[Pair], planned: pd.DataFrame, gone: pd.DataFrame,
           where: dict[str, Any], group: pd.DataFrame, fixed: set[str], one: set[str],
           tested: bool) -> list[dict[str, Any]]:
    """The comparisons of one cell at one endpoint and identity. planned, gone: whether a run is in
    the study and whether it diverged, (seeds, names). Fixed points and what is one network in all
    seeds have no residual that could be pooled, and the latter no p."""
    def wide(column: str) -> pd.DataFrame:
        return group.pivot(index="seed", columns="name", values=column).reindex(planned.index)

    values = wide("value")
    g = stats.transform(where["metric"], values.to_numpy(dtype=float, copy=True))
    place = {n: j for j, n in enumerate(values.columns)}
    g[gone[values.columns].to_numpy(dtype=bool)] = np.nan
    images = [wide(k).to_numpy(dtype=float) for k in ("images_total", "images_with_sources")]
    trained = [j for j, n in enumerate(values.columns) if n not in fixed | one]
    log, fit, rows = stats.is_log(where["metric"]), stats.layout(g[:, trained]), []
    for pair in made:
        a, b = pair.variant, pair.baseline
        if len(group) and not {a, b} & set(place):
            continue
        both = [place[x] for x in (a, b) if x in place]
        there = (np.isfinite(g[:, both]).all(axis=1) if len(both) == 2
                 else np.zeros(len(g), dtype=bool))
        sides = g[np.ix_(there, both)]
        d = sides[:, 0] - sides[:, 1] if there.any() else np.empty(0)
        means = stats.restore(where["metric"],
                              sides.mean(axis=0) if there.any() else np.full(2, np.nan))
        matched = [_equal(x[np.ix_(there, both)]) for x in images]
        e, alone = stats.paired(d.tolist()), [n for n in (a, b) if n in one]
        low, high = ((math.nan, math.nan) if {a, b} & (fixed | one)
                     else stats.pooled_interval(e.effect, e.n, fit))
        rows.append(where | e.columns(log) | {
            "variant": a, "baseline": b, "differs": ", ".join(pair.differs),
            "planned": int((planned[a] & planned[b]).sum()),
            "diverged": int((gone[a] | gone[b]).sum()),
            "low_pooled": low, "high_pooled": high, "p": math.nan if alone else e.p,
            "p_holm": math.nan, "verdict": "", "shared": ", ".join(alone),
            "sign_flip_p": math.nan if alone else stats.sign_flip_p(d.tolist()),
            "matched": matched[0], "matched_with_sources": matched[1],
            "role": pair.role if tested else "descriptive",
            "mean_variant": means[0], "mean_baseline": means[1],
            "diverged_variant": int(gone[a].sum()), "diverged_baseline": int(gone[b].sum()),
            "equal_variances_p": fit.equal_variances_p, "family": math.nan,
            "points": written(planned.index[there], d)})
    return rows


def _equal(totals: NDArray[np.float64]) -> str:
    """Whether two columns of images are equal in every block: yes, no, or unknown."""
    if not totals.size or np.isnan(totals).any():
        return "unknown"
    return "yes" if (totals[:, 0] == totals[:, 1]).all() else "no"


def effect_of(row: pd.Series) -> stats.Effect:
    """The paired effect of a comparison row, from its per-seed points."""
    return stats.paired([*points(row).values()])


def _judge(study: Study, table: pd.DataFrame) -> None:
    """Fills p_holm, family and verdict in place, for the rows that are tested."""
    family = table.index[table.role.isin(FAMILY) & (table.shared == "")]
    table.loc[family, "family"] = int(table.loc[family, "p"].notna().sum())
    table.loc[family, "p_holm"] = stats.holm(table.loc[family, "p"].tolist())
    for i in table.index[table.role != "descriptive"]:
        row = table.loc[i]
        table.loc[i, "verdict"] = stats.ONE_NETWORK if row.shared else stats.verdict(
            effect_of(row), number(study.of(row.cell).primary["margin"]),
            (row.diverged_variant, row.diverged_baseline),
            None if row.role == "primary" else row.p_holm)


def summary(cell: Cell, role: str) -> pd.DataFrame:
    """Measured values of a cell at its last point: names down, metric identities across.

    Index: names; columns: identities; entries: (mean on the metric's own scale, min, max, n). Only
    the study's first EMA. Diverged runs are left out.
    """
    rows = cell.measures[cell.measures.role == role]
    rows = cell.lasting(rows[rows["value"].notna() & ~rows.metric.isin(REPORTED)])
    if rows.empty:
        return pd.DataFrame()
    endpoint = primary_endpoint(cell)
    ema = endpoint["ema"] if endpoint and endpoint["ema"] else rows["ema"].iloc[0]
    rows = rows[(rows["at"] == rows["at"].max()) & rows["ema"].isin([ema, ""])]
    rows = rows.assign(key=list(zip(rows["metric"], rows["identity"], strict=True)))

    def entry(group: pd.DataFrame) -> tuple[float, float, float, int]:
        metric = group["metric"].iloc[0]
        g = stats.transform(metric, group["value"].to_numpy())
        mean = float(stats.restore(metric, g.mean()))
        return mean, group["value"].min(), group["value"].max(), len(group)

    cells = {(n, k): entry(group) for (n, k), group in rows.groupby(["name", "key"], sort=False)}
    names, keys = rows["name"].unique(), rows["key"].unique()
    return pd.DataFrame([[cells.get((n, k)) for k in keys] for n in names],
                        index=list(names), columns=list(keys))
