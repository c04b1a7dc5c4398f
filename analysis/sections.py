"""The report's sections of instruments: a short table and the figures of each, where a study asks
for the measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pandas as pd

from analysis import oracle, tables
from analysis.document import Block, Items, Section, Table, Text
from analysis.identities import PATHS, settings
from analysis.instruments import compared, there
from analysis.levels import (
    ERROR,
    OWN,
    RATIO,
    curve,
    planned,
    rows_of,
    single,
    stands_on,
    star_text,
    text_of,
)
from analysis.load import Cell, Study

ALT = {"gradient_noise": "noise of the gradient against t", "gradient_parts": "origins of noise",
       "gradient_step": "step size against t", "gradient_cosine": "cosine of gradients against t",
       "gradient_slopes": "losses and gradients against N",
       "gradient_rounding": "error of half precision against t",
       "trajectories": "distance to the end", "drift": "drift along trajectories",
       "fixed_points": "bias of fixed points"}
GRADIENT = {  # columns, what they stand over, caption
    "gradient_noise": (
        (("rho", "rho"), ("rho_adam", "rho, Adam's metric"), ("estimator", "estimate"),
         ("dropout", "dropout"), ("draw", "draw"), ("total", "total"), ("snr", "signal / noise")),
        "law",
        f"under the law of training, means over seeds {ERROR}. rho is the estimate's "
        "share of the variance; estimate, dropout, draw and total are variances of one image's "
        "gradient, summed over parameters; signal / noise is the squared mean gradient over the "
        f"total. {RATIO} {OWN} {{star}}"),
    "gradient_cosine": (
        (("cosine", "cosine"), ("snr_score", "signal / noise, first"),
         ("snr_against", "signal / noise, second")),
        "law",
        "mean gradients of {first} (first) and {second} (second) at the same weights under the "
        f"law of training, noise removed; means over seeds {ERROR}. {OWN} {{star}}"),
    "gradient_slopes": (
        (("slope_loss", "losses, fitted"), ("predicted_slope_loss", "losses, predicted"),
         ("slope_gradient", "gradients, fitted"),
         ("predicted_slope_gradient", "gradients, predicted")),
        "run",
        "slopes in ln N of the relative differences of losses and mean gradients of {first} and "
        f"{{second}}; means over seeds {ERROR}. –: no slope is predicted, or none "
        "could be fitted."),
    "gradient_rounding": (
        (("error", "one batch"), ("bias", "mean gradient"),
         ("error_over_noise", "error / noise"), ("cosine_batch", "cosine, one batch"),
         ("residual_error", "step"), ("step_over_c", "step over c")),
        "law",
        "gradients in each variant's own half precision against float32 ones at the same weights "
        f"on the same batches, under the law of training; means over seeds {ERROR}. Relative "
        "errors: of one batch's gradient (rms), of the mean gradient with noise removed (–: "
        "noise left its square negative), and of the step f(x_t, t) - f^-(x_r, r) (rms over "
        "images). Error / noise: over the standard deviation of a batch's gradient, far below "
        f"which rounding is lost in the noise. {OWN}")}
MEMORY = (("value", "nearer to training images"), ("null_se", "by luck ±"),
          ("excess", "excess, whole training set"), ("excess_null_se", "by luck ±"),
          ("nearest_train", "distance to training images"),
          ("nearest_held_out", "of held-out images"), ("ratio", "ratio"))
COVERAGE = (("precision", "precision"), ("recall", "recall"), ("tv", "class-share error (TV)"))


def sections(study: Study, figures: Callable[[str], list[Block]]) -> list[Section]:
    """The sections of what the study asks for. figures: the blocks of a kind of figure."""
    made = []
    for title, kinds, drawn, table in (
            ("Noise of the gradient", ("gradient_noise",),
             ("gradient_noise", "gradient_parts", "gradient_step"),
             partial(gradient, "gradient_noise")),
            *((title, (kind,), (kind,), partial(gradient, kind)) for title, kind in (
                ("Direction of the gradient", "gradient_cosine"),
                ("Losses and gradients against N", "gradient_slopes"),
                ("Half precision", "gradient_rounding"))),
            ("One trajectory, one output", ("trajectories",), ("trajectories", "drift"), paths),
            ("Fixed points", ("pushforward",), ("fixed_points",), oracle.blocks),
            ("Memorisation and coverage", ("memorisation", "coverage"), (), samples)):
        cells = [c for c in study.cells if any(planned(c, kind) for kind in kinds)]
        if cells:
            blocks = [b for c in cells for b in table(c)]
            blocks += [b for kind in drawn for b in figures(kind)] if blocks else []
            made.append(Section(title, blocks or [
                Text(f"No data yet: {title[:1].lower()}{title[1:]}.")]))
    return made


def gradient(kind: str, cell: Cell) -> list[Block]:
    """One row per variant and point of training, means over seeds; columns without a number are
    left out."""
    columns, over, caption = GRADIENT[kind]
    rows = rows_of(cell, kind, last=False)
    columns = [c for c in columns if ((rows.quantity == c[0]) & (rows.over == over)).any()]
    if not columns:
        return []
    body, several = [], rows["at"].nunique() > 1
    for name, every in rows[rows.over == over].groupby("name", sort=False):
        for at, own in every.groupby("at"):
            body.append((str(name), *[f"{100 * at:g} %"] * several,
                         *(text_of(single(own, q, over)) for q, _ in columns),
                         f"{own['id'].nunique()}"))
    header = ("variant", *["at"] * several, *(c[1] for c in columns), "seeds")
    first, second = compared(cell, rows)
    told = caption.format(first=first, second=second, star=star_text(cell))
    return [Table(header, body, f"{cell.name}: {told} {stands_on(cell, rows)}")]


def paths(cell: Cell) -> list[Block]:
    """Error at T, drift and spread by path."""
    rows = rows_of(cell, "trajectories")
    measured = there(rows)
    if not measured:
        return []
    floor = single(rows, "floor")
    top, body = rows[rows.over == "sigma"].level.max(), []
    for name, own in rows.groupby("name", sort=False):
        for path in measured:
            end = curve(own, path)
            if top in end.index:
                entry = end.loc[top].to_dict()
                body.append((str(name), PATHS[path], text_of(entry),
                             text_of(single(own, f"spread_{path}")),
                             text_of(floor) if path.endswith("teacher") else "–",
                             f"{entry['n']:.0f}"))
    return [Table(("variant", "path", "error at T", "spread along the path", "floor", "seeds"),
                  body,
                  f"{cell.name}: distance of f(x(T), T), T = {top:.3g}, to the end of each "
                  "score's path from there, and spread of f along it: rms in units of the data, "
                  f"means over seeds {ERROR}. The floor is the distance between the "
                  "ends of two teachers' paths. " + stands_on(cell, rows))]


def samples(cell: Cell) -> list[Block]:
    """Memorisation, precision, recall and the histogram of classes at the end, of variants once
    each and of sources."""
    blocks: list[Block] = []
    every = cell.instruments
    for kind, columns, caption in (
            ("memorisation", MEMORY,
             "share of samples whose nearest training image is nearer than their nearest held-out "
             "one, of equally many each: 0.5 where nothing is memorised. Excess: the same against "
             "the whole training set, scaled to 0 where nothing is memorised and 1 where "
             "everything is. By luck: the standard deviation over images and samples where "
             "nothing is. Then the median distances of samples, and of held-out images, to the "
             "training images, and their ratio."),
            ("coverage", COVERAGE,
             "precision is the share of samples near real images, recall the share of real images "
             "near samples, in the extractor's features; both are better high.")):
        rows = every[every.kind == kind]
        names = [*tables.variants(cell), *rows[rows.role == "source"].name.unique()]
        rows = cell.lasting(rows[rows.name.isin(names)])
        rows = rows[rows["at"] == rows["at"].max()]
        if rows.empty:
            continue
        columns = [c for c in columns if (rows.quantity == c[0]).any()]
        body = []
        for (name, ema, nfe), own in rows.groupby(["name", "ema", "nfe"], sort=False):
            entries = {q: single(own, q) for q, _ in columns}
            body.append((str(name), str(ema), f"{nfe:g}", *(
                text_of(e | {"se": math.nan} if q.endswith("_se") else e)  # itself an error
                for q, e in entries.items()), f"{own['id'].nunique()}"))
        blocks.append(Table(("name", "EMA", "NFE", *(c[1] for c in columns), "seeds"), body,
                            f"{cell.name}: {caption} Means over seeds. {stands_on(cell, rows)}"))
    return blocks + _histogram(cell, rows)


def _histogram(cell: Cell, rows: pd.DataFrame) -> list[Block]:
    """Shares of classes, the training images' first."""
    classes = sorted(rows[rows.over == "class"].level.unique())
    if not classes:
        return []

    def line(name: str, own: pd.DataFrame, quantity: str) -> tuple[str, ...]:
        mean = curve(own, quantity, "class")["mean"]
        return name, *(f"{100 * mean[c]:.1f}" if c in mean.index else "–" for c in classes)

    body = [line("training images", rows, "reference_shares")]
    for (name, ema, nfe), own in rows.groupby(["name", "ema", "nfe"], sort=False):
        alike = rows[rows.name == name].groupby(["ema", "nfe"]).ngroups
        body.append(line(f"{name}, EMA {ema}, {nfe:g} NFE" if alike > 1 else str(name), own,
                         "shares"))
    return [Table(("percent of class", *(f"{c:g}" for c in classes)), body,
                  f"{cell.name}: shares of the classes that the extractor's classifier sees, "
                  "means over seeds.")]


def identities(study: Study) -> list[Block]:
    """What the measured values are, what all have in common said once."""
    every = [[what.partition("[")[0], *(f"{k}={v}" for k, v in settings(what).items())]
             for what in study.measures.identity.unique()]
    common = [p for p in every[0] if all(p in other for other in every)] if every[1:] else []
    lines = [", ".join(p for p in line if p not in common) for line in every]
    return [Text("Metric identities; only equal ones are compared or averaged"
                 + (f"; all have {', '.join(common)}:" if common else ":")),
            Items(lines or ["none yet"])]
