"""Numbers, factors and results in words: signs, units, the answer to the study's question."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
from matplotlib.ticker import EngFormatter

from analysis import stats, tables
from analysis.load import Study
from analysis.recipes import AMOUNT, BUDGET, computed, differing, planned

SI = EngFormatter(sep="\u00a0")
VERDICTS = {"tie": "a tie within the margin",
            "supported": "the claim that {variant} is worse is supported",
            "refuted": "the claim that {variant} is worse is refuted",
            stats.SCREENING: "screening, no verdict"}
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
GLOSSARY = ("EMA: moving average of the weights, its length a share of training. NFE: network "
            "evaluations per sample. Block: the runs of one cell and seed, which differ only in "
            "the variant. Charged: images spent on a source and taken from the variant's own "
            "budget. Images equal: own + charged images are; with sources: also those that all "
            "its sources were trained on. Real against real: the metric between real images and "
            "other real images, what a perfect model would reach.")


def answers(study: Study, table: pd.DataFrame) -> list[str]:
    """The primary comparison in one sentence per cell, with its interval and number of seeds."""
    sentences = []
    for cell in study.cells:
        where = f"In {cell}, " if len(study.cells) > 1 else ""
        rows = table[(table.cell == cell) & (table.role == "primary")]
        primary = study.primaries.get(cell)
        if primary is None:
            sentences.append(f"{where}no primary comparison is declared: nothing is tested.")
        elif rows.empty:
            sentences.append(f"{where}{primary['variant']} and {primary['against']} are the same "
                             "run: there is nothing to compare.")
        sentences += [where + sentence(row) for _, row in rows.iterrows()]
    return [s[:1].upper() + s[1:] if s.startswith("no ") else s for s in sentences]


def sentence(row: pd.Series) -> str:
    """A comparison in one sentence: size, means, interval, seeds, verdict, what is unequal."""
    name, log = tables.title(row.metric, row.nfe), stats.is_log(row.metric)
    seeds = f"{row.n} of {row.planned} seeds"
    gone = (f" Diverged: {row.diverged_variant} of {row.variant}, {row.diverged_baseline} of "
            f"{row.baseline}." if row.diverged else "")
    gone += " The two are not matched in images." if row.matched == "no" else ""
    verdict = VERDICTS.get(row.verdict, row.verdict).format(variant=row.variant)
    if row.n == 0:
        return (f"not answered yet: no seed of {row.planned} has the {name} of both {row.variant} "
                f"and {row.baseline}.{gone}")
    higher = (row.effect > 0) != (row.metric in stats.BETTER_HIGH)
    size = (f"{abs(row.percent):.{1 if abs(row.percent) < 10 else 0}f}\u00a0%" if log
            else f"{abs(row.effect):.3g}")
    text = (f"{row.variant}'s {name} is {size} {'higher' if higher else 'lower'} than "
            f"{row.baseline}'s ({row.mean_variant:.3g} against {row.mean_baseline:.3g}, "
            f"{'geometric ' if log else ''}means; ")
    if row.n < stats.INTERVAL_FROM:
        show = percent_text if log else signed
        points = ", ".join(show(float(p.split(":")[1])) for p in row["points"].split())
        return f"{text}{seeds}: {points}; too few for an interval): {verdict}.{gone}"
    null = "the interval includes no difference (0); " if row.low <= 0 <= row.high else ""
    return (f"{text}95 % interval {interval(row.low, row.high, log)}, {seeds}): "
            f"{null}{verdict}.{gone}")


def beside(study: Study, table: pd.DataFrame) -> list[str]:
    """One sentence for every other comparison that differs in the primary's factor alone, and the
    noise floor that each A/A twin gives.
    """
    sentences = []
    for cell in study.cells:
        rows = table[(table.cell == cell) & table.role.isin(["primary", "secondary"])]
        factors = rows[rows.role == "primary"].differs
        rows, where = rows[rows.role == "secondary"], f"{cell}: " * (len(study.cells) > 1)
        for _, row in rows[rows.n > 0].iterrows():
            if row.differs in set(factors) and ", " not in row.differs:
                sentences.append(where + sentence(row))
            elif row.differs == "data_stream":
                sentences.append(
                    f"{where}noise floor: {row.variant} and {row.baseline} are the same training "
                    "on other noise and order, so their difference "
                    f"({interval(row.low, row.high, stats.is_log(row.metric))}, 95 % interval, "
                    f"{row.n} of {row.planned} seeds) is chance alone.")
    return sentences


def powers(study: Study, table: pd.DataFrame) -> list[str]:
    """What more seeds would show: the power of the primary comparison, from six seeds on."""
    texts = []
    for _, row in table[table.role == "primary"].iterrows():
        margin = float(study.primaries[row.cell]["margin"])
        seeds = stats.seeds_needed(tables.effect_of(row), margin)
        size = percent_text(margin) if stats.is_log(row.metric) else f"{margin:g}"
        if row.n and row.n < stats.VERDICT_FROM:
            how = ("This command trains only the new seeds:" if more_seeds(study) else
                   f"The study plans {row.planned} for this comparison.")
            texts.append(f"A verdict wants {stats.VERDICT_FROM} seeds or more; fewer show "
                         f"effects and their spread. {how}")
        elif seeds:
            texts.append(f"With the spread seen in {row.cell}, an effect as large as the margin "
                         f"({size}) would need {seeds} seeds to be found with a chance of 80 %.")
    return list(dict.fromkeys(texts))


def more_seeds(study: Study) -> str:
    """The command that brings a study to the seeds that a verdict wants; "" if it plans them."""
    new = [s for s in range(2 * stats.VERDICT_FROM) if s not in study.seeds]
    seeds = [*study.seeds, *new][:stats.VERDICT_FROM]
    return (f"python -m study.run sweeps/{study.name}.yaml --set seeds='{seeds}'"
            if len(study.seeds) < stats.VERDICT_FROM else "")


def recipes(study: Study, cell: str) -> tuple[list[tuple[str, str, str]], str]:
    """(name, its factors, its images) per variant of a cell, and the factors that they share.

    A variant is told by the factors in which it differs from the value that most have, and by
    those in which the primary's two sides differ.
    """
    every = {r["name"]: r for r in study.recipes if r["cell"] == cell}
    own = [r for r in every.values() if r["role"] == "variant"]
    primary = study.primaries.get(cell)
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
    alpha, beta = float(given.get("alpha", math.nan)), float(given.get("beta", math.nan))
    run = given.get("run")
    mean = ("exact posterior mean" if alpha == 1 else f"mean of teacher {run}" if alpha == 0 else
            f"{alpha:g} exact posterior mean + {1 - alpha:g} teacher {run}")
    noise = "no noise" if beta == 0 else f"{beta:g} of the single sample's noise"
    gaussian = ", Gaussian" if given.get("residual") == "gaussian" and beta else ""
    return f"{mean}, {noise}{gaussian} (blend alpha {alpha:g}, beta {beta:g})"


def percent_text(effect: float) -> str:
    """A log difference as a signed percentage."""
    return f"{percent_number(effect)}\u00a0%"


def percent_number(effect: float) -> str:
    """A log difference in percent, signed, with two digits that count."""
    value = stats.percent(effect)
    return f"{value:+.{1 if abs(value) < 10 else 0}f}".replace("-", "\u2212")


def interval(low: float, high: float, log: bool) -> str:
    """An interval, in percent if it is one of log differences."""
    if math.isnan(low):
        return "–"
    ends = [percent_number(x) if log else signed(x) for x in (low, high)]
    return " to ".join(ends) + ("\u00a0%" if log else "")


def signed(value: float) -> str:
    """A number with its sign and three digits."""
    return f"{value:+.3g}".replace("-", "\u2212")


def p_text(value: float) -> str:
    """A p value with three decimals."""
    return "–" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"


def count(value: float) -> str:
    """A whole number with thousands set off."""
    return "–" if math.isnan(value) else f"{value:,.0f}"


def short(value: float) -> str:
    """A quantity with three digits and an SI prefix."""
    return "–" if math.isnan(value) else SI(float(f"{value:.3g}"))


def value(entry: tuple[float, float, float, int] | None, seeds: int) -> str:
    """A mean with its range over runs, and their number unless it is all seeds."""
    if not isinstance(entry, tuple):
        return "–"
    mean, low, high, n = entry
    return f"{mean:.3g}\n({low:.3g} to {high:.3g}{'' if n == seeds else f'; n {n}'})"
