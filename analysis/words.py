"""Numbers and results in words: signs, units, and the answer to the study's question."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.ticker import EngFormatter

from analysis import stats, tables
from analysis.load import Study

SI = EngFormatter(sep="\u00a0")
VERDICTS = {"tie": "a tie within the margin",
            "supported": "the claim that {variant} is worse is supported",
            "refuted": "the claim that {variant} is worse is refuted",
            stats.SCREENING: "screening, no verdict"}


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
        sentences += [where + _sentence(row) for _, row in rows.iterrows()]
    return [s[:1].upper() + s[1:] if s.startswith("no ") else s for s in sentences]


def _sentence(row: pd.Series) -> str:
    name, log = tables.title(row.metric, row.nfe), stats.is_log(row.metric)
    seeds = f"{row.n} of {row.planned} seeds"
    gone = (f" Diverged: {row.diverged_variant} of {row.variant}, {row.diverged_baseline} of "
            f"{row.baseline}." if row.diverged else "")
    gone += " The two are not matched in images." if row.matched == "no" else ""
    verdict = VERDICTS.get(row.verdict, row.verdict).format(variant=row.variant)
    if row.n == 0:
        return (f"not answered yet: no seed of {row.planned} has the {name} of both {row.variant} "
                f"and {row.baseline}.{gone}")
    size = (f"{abs(row.percent):.{1 if abs(row.percent) < 10 else 0}f}\u00a0%" if log
            else f"{abs(row.effect):.3g}")
    text = f"{row.variant}'s {name} is {size} {'higher' if row.effect > 0 else 'lower'} than " \
           f"{row.baseline}'s"
    show = percent_text if log else signed
    if row.n < stats.INTERVAL_FROM:
        points = ", ".join(show(float(p.split(":")[1])) for p in row["points"].split())
        return f"{text} ({seeds}: {points}; too few for an interval): {verdict}.{gone}"
    return (f"{text} (95 % interval {interval(row.low, row.high, log)}, {seeds}): "
            f"{verdict}.{gone}")


def powers(study: Study, table: pd.DataFrame) -> list[str]:
    """What more seeds would show: the power of the primary comparison, from six seeds on."""
    texts = []
    for _, row in table[table.role == "primary"].iterrows():
        margin = float(study.primaries[row.cell]["margin"])
        seeds = stats.seeds_needed(tables.effect_of(row), margin)
        size = percent_text(margin) if stats.is_log(row.metric) else f"{margin:g}"
        if row.n and row.n < stats.VERDICT_FROM:
            texts.append(f"A verdict wants {stats.VERDICT_FROM} seeds or more; {row.n} show "
                         "effects and their spread.")
        elif seeds:
            texts.append(f"With the spread seen in {row.cell}, an effect as large as the margin "
                         f"({size}) would need {seeds} seeds to be found with a chance of 80 %.")
    return texts


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
