"""The answer to the study's question: comparisons in sentences, and what more seeds would show."""

from __future__ import annotations

import math

import pandas as pd

from analysis import stats, tables
from analysis.identities import points, standing
from analysis.load import Cell, Study
from analysis.words import ONE_NETWORK, change, interval, p_text
from study.errors import several

BULLETS = 8  # more in a cell stand in the table alone


def answers(study: Study, table: pd.DataFrame) -> list[str]:
    """The primary comparison in one sentence per cell, with its interval and number of seeds."""
    sentences = []
    for cell in study.cells:
        where = f"In {cell.name}, " * bool(cell.prefix)
        rows = _rows(table, cell, "primary")
        if not cell.primary:
            sentences.append(f"{where}no primary comparison is declared: nothing is tested.")
        elif not rows:
            sentences.append(f"{where}{cell.primary['variant']} and {cell.primary['against']} are "
                             "the same run: there is nothing to compare.")
        sentences += [where + told(cell, row) for row in rows]
    return [s[:1].upper() + s[1:] if s.startswith(("no ", "on ")) else s for s in sentences]


def told(cell: Cell, row: pd.Series) -> str:
    """A comparison of the table in one sentence, led by what it stands on where that differs."""
    fixed = {row.variant, row.baseline} & cell.fixed
    return standing(row, "on {}, ") + sentence(row, bool(fixed))


def sentence(row: pd.Series, fixed: bool = False) -> str:
    """A comparison in one sentence: size, means, interval, seeds, verdict, what is unequal.

    fixed: one side is a fixed point.
    """
    name, log = tables.title(row.metric, row.nfe), stats.is_log(row.metric)
    end, each = _unequal(row, fixed), points(row).values()
    if row.n == 0:
        return (f"not answered yet: no seed of {row.planned} has the {name} of both {row.variant} "
                f"and {row.baseline}.{end}")
    means = f"{row.mean_variant:.3g} against {row.mean_baseline:.3g}"
    means += f", {'geometric ' if log else ''}means" if row.n > 1 else ""
    if not any(each):
        return (f"{row.variant}'s {name} is {row.baseline}'s in every seed "
                f"({row.mean_variant:.3g}; {seeds(row)}).{end}")
    higher = (row.effect > 0) != (row.metric in stats.BETTER_HIGH)
    size = (f"{abs(row.percent):.{1 if abs(row.percent) < 10 else 0}f}\u00a0%" if log
            else f"{abs(row.effect):.3g}")
    is_ = (f"differs from {row.baseline}'s by less than 0.05\u00a0%" if size == "0.0\u00a0%" else
           f"is equal to {row.baseline}'s on average" if size == "0" else
           f"is {size} {'higher' if higher else 'lower'} than {row.baseline}'s")
    if row.n < stats.INTERVAL_FROM:
        two = f": {', '.join(change(x, log) for x in each)}" if row.n > 1 else ""
        spread = f"{seeds(row)}{two}, too few for an interval"
    else:
        spread = f"95 % interval {interval(row.low, row.high, log)}, {seeds(row)}"
    null = "the interval includes no difference (0); " if row.low <= 0 <= row.high else ""
    return f"{row.variant}'s {name} {is_} ({means}; {spread}): {null}{verdict(row)}.{end}"


def seeds(row: pd.Series) -> str:
    """The seeds that a comparison stands on, and those planned where they are more."""
    return several(row.n, "seed") + (f"; {row.planned} planned" if row.n < row.planned else "")


def verdict(row: pd.Series) -> str:
    """A verdict in words, with its reason where the interval alone would say otherwise."""
    claim = f"the claim that {row.variant} is worse is"
    match row.verdict:
        case "tie":
            return "a tie: the 90 % interval lies within the margin"
        case "supported":
            return f"{claim} supported"
        case "refuted" if row.high < 0:
            return f"{claim} refuted: {row.variant} is better"
        case "refuted":
            return f"{claim} refuted: the upper bound lies below the margin"
        case "undecided" if row.low > 0 and row.diverged_variant != row.diverged_baseline:
            return "undecided: the two did not diverge equally often"
        case "undecided" if row.low > 0 and row.p_holm == row.p_holm:
            return f"undecided: Holm p = {p_text(row.p_holm)} over {row.family:.0f} comparisons"
        case stats.ONE_NETWORK if ", " in row.shared:
            return "no verdict, as each side is one network: the interval is of sampling only"
        case stats.ONE_NETWORK:
            return f"no verdict, as {row.shared} is {ONE_NETWORK}"
        case stats.SCREENING:
            return f"screening, no verdict below {stats.VERDICT_FROM} seeds"
        case other:
            return other


def _unequal(row: pd.Series, fixed: bool) -> str:
    gone = (f" Diverged: {row.diverged_variant} of {row.variant}, {row.diverged_baseline} of "
            f"{row.baseline}." if row.diverged else "")
    if fixed:
        return gone + (" One side is computed without training: what is left is the network's "
                       "own error.")
    return gone + (" The two are not matched in images." if row.matched == "no" else "")


def named(study: Study, table: pd.DataFrame) -> list[str]:
    """One sentence for every comparison that the study names beside its primary."""
    return [cell.prefix + told(cell, row)
            + f" They differ in {row.differs}." * (", " in row.differs)
            for cell in study.cells for row in _rows(table, cell, "named")]


def beside(study: Study, table: pd.DataFrame) -> list[str]:
    """One sentence for every other comparison that differs in exactly one factor, and the noise
    floor that each A/A twin gives. In a cell of more than BULLETS such, named ones included, the
    noise floor alone.
    """
    found = []
    for cell in study.cells:
        single = [r for r in _rows(table, cell, "secondary") if r.n > 0 and ", " not in r.differs]
        floors = [r for r in single if r.differs == "data_stream"]
        others = [r for r in single if r.differs != "data_stream"]
        many = len(single) + len(_rows(table, cell, "named")) > BULLETS
        found += [] if many else [cell.prefix + told(cell, r) for r in others]
        found += [cell.prefix + _floor(r) for r in floors]
        if many and others:
            found.append(f"{cell.prefix}{several(len(others), 'more comparison')} that "
                         f"{'differs' if len(others) == 1 else 'differ'} in one factor: see the "
                         "table under Comparisons.")
    return found


def _floor(row: pd.Series) -> str:
    log = stats.is_log(row.metric)
    size = (f"{interval(row.low, row.high, log)}, 95 % interval, " if not math.isnan(row.low) else
            "; ".join(change(x, log) for x in points(row).values()) + ", ")
    on = standing(row, " on {}")
    return (f"noise floor{on}: {row.variant} and {row.baseline} are the same training on other "
            f"noise and order, so their difference ({size}{seeds(row)}) is chance alone.")


def _rows(table: pd.DataFrame, cell: Cell, role: str) -> list[pd.Series]:
    return [row for _, row in table[(table.cell == cell.name) & (table.role == role)].iterrows()]


def powers(study: Study, table: pd.DataFrame) -> list[str]:
    """What more seeds would show: the power of the primary comparison, from six seeds on. Beside
    one network they would show nothing."""
    texts = []
    for cell, row in ((c, r) for c in study.cells for r in _rows(table, c, "primary")
                      if not r.shared):
        margin = float(cell.primary["margin"])
        needed = stats.seeds_needed(tables.effect_of(row), margin)
        size = change(margin, True) if stats.is_log(row.metric) else f"{margin:g}"
        if row.n and row.n < stats.VERDICT_FROM:
            how = more_seeds(study) or f"The study plans {row.planned} for this comparison."
            texts.append(f"A verdict wants {stats.VERDICT_FROM} seeds or more; fewer show "
                         f"effects and their spread. {how}")
        elif needed:
            texts.append(f"With the spread seen in {cell.name}, an effect as large as the margin "
                         f"({size}) would need {needed} seeds to be found with a chance of 80 %.")
    return list(dict.fromkeys(texts))


def more_seeds(study: Study) -> str:
    """How to bring a study to the seeds that a verdict wants; "" if it plans them."""
    new = [s for s in range(2 * stats.VERDICT_FROM) if s not in study.seeds]
    wanted = [*study.seeds, *new][:stats.VERDICT_FROM]
    return (f"The command that made this study, with --set seeds='{wanted}', trains only the new "
            "seeds." if len(study.seeds) < stats.VERDICT_FROM else "")
