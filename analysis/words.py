"""Numbers and factors in words: signs, units, how a variant is trained."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
from matplotlib.ticker import EngFormatter

from analysis import stats
from analysis.load import Cell
from analysis.recipes import AMOUNT, BUDGET, computed, differing, kind_of, planned
from analysis.records import number

SI = EngFormatter(sep="\u00a0")
KINDS = {"single_sample": "single sample (CT)", "teacher": "teacher {run} (CD)",
         "empirical": "exact posterior mean of the training set",
         "analytic": "exact posterior mean of the mixture", "run": "weights of {run}",
         "frozen": "frozen {run}", "stopgrad": "own weights, stop-gradient",
         "posterior_k": "mean of {k} posterior draws", "none": "none", "data": "the images",
         "k_sample": "self-normalised mean over {n} references",
         "own": "own denoising head (average mu {mu}, grown in over {ramp} of training)",
         "windowed": "{inside} for t in ({t_low}, {t_high}], {outside} elsewhere",
         "denoising_head": "a denoising head beside f (weight {weight}, labels: {labels})",
         "ect": "ECT's mapping r(t) (q {q}, k {k}, b {b}, {stages} stages)",
         "continuous": "continuous time (sCM; warm-up {warm_up} of training, c {c})",
         "fixed_point": "fixed point, computed and not trained",
         "l2": "mean square", "l2_norm": "norm, not squared", "l1": "mean absolute difference",
         "log_uniform": "log-uniform"}
ONE_NETWORK = "one network: the interval is of sampling and of the other side only"
SEEN = "the extractor may have been trained on some of these held-out images"
NO_FLOOR = "no floor: fewer images are held out than are compared"
GLOSSARY = ("EMA: moving average of the weights, its length a share of training. NFE: network "
            "evaluations per sample. Block: the runs of one cell and seed, which differ only in "
            "the variant. Charged: images spent on a source and taken from the variant's own "
            "budget. Images equal: own + charged images are; with sources: also those that all "
            "its sources were trained on. Real against real: the metric between real images and "
            "other real images, what a perfect model would reach.")


def recipes(cell: Cell) -> tuple[list[tuple[str, str, str]], str]:
    """(name, its factors, its images) per variant of a cell, and the factors that they share.

    A variant is told by the factors in which it differs from the value that most have, and by
    those in which the primary's two sides differ.
    """
    every = cell.recipes
    own = [r for r in every.values() if r["role"] == "variant"]
    primary = cell.primary
    told = differing(every, primary["variant"], primary["against"]) if primary else ()
    found: dict[str, list[str]] = {r["name"]: [] for r in own}
    shared = []
    for factor in dict.fromkeys(f for r in own for f in r["factors"]):
        if factor == BUDGET:
            continue
        texts = {r["name"]: factor_text(r["factors"].get(factor)) for r in own
                 if factor not in r["ignored"]}
        if factor == "repeat":
            texts = {n: t if t == "1" else f"{t} draws of x per x_t, their losses averaged"
                     for n, t in texts.items()}
        values = list(texts.values())
        common = max(values, key=values.count, default="")
        label = factor.replace("_", " ")
        for name, text in texts.items():
            if text != common or factor in told:
                found[name].append(f"{label}: {text}")
        if factor not in told:
            shared.append(f"{label} {common}")
    rows = []
    for name, parts in found.items():
        images, charged = planned(every, name)
        spent = f"{AMOUNT(images)} own" + f" + {AMOUNT(charged)} charged" * bool(charged)
        rows.append((name, "; ".join(parts) or "all as most",
                     "none: computed" if computed(every[name]) else spent))
    return rows, "; ".join(shared)


def factor_text(given: Any) -> str:  # noqa: ANN401 (a JSON value)
    """A factor's value in plain words."""
    if isinstance(given, dict):
        if given.get("kind") == "blend":
            return _blend(given)
        fields = {k: v for k, v in given.items() if k != "kind" and v is not None}
        kind = str(given.get("kind", ""))
        if kind in KINDS:
            parts = {k: factor_text(v) for k, v in fields.items()}
            if kind == "denoising_head" and "run" in fields.get("labels", {}):
                parts["labels"] = f"the denoiser {fields['labels']['run']}"
            shared = ", shared by the batch" if fields.get("shared") is True else ""
            try:
                return KINDS[kind].format_map(parts) + shared
            except KeyError:  # settings leave out what is as by default
                return KINDS[kind].split(" (")[0].replace("{run}", "?")
        kind = kind.replace("_", " ")
        inner = ", ".join(f"{k} {factor_text(v)}" for k, v in fields.items())
        return f"{kind} ({inner})" if inner and kind else inner or kind
    return given if isinstance(given, str) else json.dumps(given)


def _blend(given: dict[str, Any]) -> str:
    """A blend's mean, between the teacher's and the exact one, and its noise."""
    alpha, beta = number(given.get("alpha")), number(given.get("beta"))
    run = given.get("run")
    mean = ("exact posterior mean" if alpha == 1 else f"mean of teacher {run}" if alpha == 0 else
            f"{alpha:g} exact posterior mean + {1 - alpha:g} teacher {run}")
    noise = "no noise" if beta == 0 else f"{beta:g} of the single sample's noise"
    gaussian = ", Gaussian" if given.get("residual") == "gaussian" and beta else ""
    return f"{mean}, {noise}{gaussian} (blend alpha {alpha:g}, beta {beta:g})"


def change(effect: float, log: bool) -> str:
    """An effect with its sign, as a percentage if it is a log difference."""
    return _number(effect, log) + "\u00a0%" * log


def _number(effect: float, log: bool) -> str:
    """The same without its unit; a percentage has two digits that count."""
    if not log:
        return signed(effect)
    value = stats.percent(effect)
    return _minus(f"{value:+.{1 if abs(value) < 10 else 0}f}")


def interval(low: float, high: float, log: bool) -> str:
    """An interval, in percent if it is one of log differences."""
    if math.isnan(low):
        return "–"
    return f"{_number(low, log)} to {change(high, log)}"


def signed(value: float) -> str:
    """A number with its sign and three digits."""
    return _minus(f"{value:+.3g}")


def _minus(text: str) -> str:
    """A number with a sign for minus; zero has none."""
    return "0" if float(text) == 0 else text.replace("-", "\u2212")


def p_text(value: float) -> str:
    """A p value with three decimals."""
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"


def count(value: float) -> str:
    """A whole number with thousands set off."""
    return "–" if math.isnan(value) else f"{value:,.0f}"


def short(value: float) -> str:
    """A quantity with three digits and an SI prefix."""
    return "–" if math.isnan(value) else SI(float(f"{value:.3g}"))


def seconds(value: float) -> str:
    """A time in seconds with three digits."""
    if math.isnan(value):
        return "–"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f} s" if abs(rounded) >= 1000 else f"{rounded:g} s"


def seen(cell: Cell, rows: pd.DataFrame) -> str:
    """What a caption owes its reader of measured values that stand on the held-out images of a
    folder, directly or in their floor, by an extractor of such data; "" where none do."""
    folder = any(kind_of(r["factors"], "data") == "images" for r in cell.recipes.values())
    held_out = (rows.floor.notna() | (rows.reference == "held_out")) & rows.identity.str.contains(
        r"\bextractor=[^,:]+-cnn\b")
    return (f"Read numbers against held-out images, and real against real, with care: {SEEN}."
            if folder and held_out.any() else "")


def value(entry: tuple[float, float, float, int] | None, seeds: int) -> str:
    """A mean with its range over runs that differ, and their number unless it is all seeds."""
    if not isinstance(entry, tuple):
        return "–"
    mean, low, high, n = entry
    texts = [f"{x + 0.0:.3g}" for x in (mean, low, high)]
    beside = [f"{texts[1]} to {texts[2]}"] * (texts[1] != texts[2]) + [f"n {n}"] * (n != seeds)
    return texts[0] + (f"\n({'; '.join(beside)})" if beside else "")
