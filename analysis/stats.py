"""Paired statistics over blocks. A block is (cell, seed): its runs differ only in the variant.

An effect is the mean over blocks of d_i = g(variant_i) - g(baseline_i), with g = ln for distances
that live on a ratio scale (FID, sliced Wasserstein, map error), g = identity for KID, which may be
negative, and for shares, and g = minus for shares that are better high. d > 0 means the variant is
worse. Intervals are Student's, mean(d) +- t_{n-1} sd(d) / sqrt(n), from n = 3; two blocks are
shown as two points, one as itself.
Blocks of several cells are never pooled. Fewer than six blocks are a screening: no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

LOG_METRICS = ("fid", "sliced_wasserstein", "map_error", "trajectory_error", "pushforward_w2")
BETTER_HIGH = ("precision", "recall")
INTERVAL_FROM = 3
VERDICT_FROM = 6
SIGN_FLIP_UP_TO = 20  # 2^20 sign patterns; beyond that the t test is as good
SCREENING = "screening: no verdict"
ONE_NETWORK = "one network: no verdict"  # its values over seeds are not independent runs


@dataclass(frozen=True)
class Effect:
    """A paired effect; nan marks what n does not allow. low, high: 95 %; low90, high90: 90 %."""

    n: int
    effect: float
    sd: float
    low: float
    high: float
    low90: float
    high90: float
    p: float

    def columns(self, log: bool) -> dict[str, float]:
        """The effect as columns of a table, in percent too where it is of logarithms."""
        row = {k: getattr(self, k) for k in ("n", "effect", "low", "high", "sd", "p")}
        return row | {f"percent{end}": percent(row[key]) if log else math.nan for key, end in (
            ("effect", ""), ("low", "_low"), ("high", "_high"))}


@dataclass(frozen=True)
class Layout:
    """Least-squares residuals of g_ij = block_i + variant_j + e_ij, nan where not measured.

    variance is the residual mean square on df degrees of freedom; equal_variances_p is the
    Brown-Forsythe p that all variants have one residual variance (approximate: the residuals of a
    block sum to zero).
    """

    residuals: NDArray[np.float64]  # (blocks, variants)
    variants: NDArray[np.float64]  # (variants,) effects, mean zero
    variance: float
    df: int
    equal_variances_p: float


def is_log(metric: str) -> bool:
    """Whether effects of this metric are differences of logarithms."""
    return metric in LOG_METRICS


def transform(metric: str, values: ArrayLike) -> NDArray[np.float64]:
    """g of the metric, elementwise; a value that has no logarithm becomes nan, "not measured"."""
    x = np.asarray(values, dtype=float)
    if not is_log(metric):
        return -x if metric in BETTER_HIGH else x
    return np.log(x, out=np.full_like(x, np.nan), where=x > 0)


def restore(metric: str, g: ArrayLike) -> NDArray[np.float64]:
    """The metric's own values of transformed ones, elementwise."""
    g = np.asarray(g, dtype=float)
    return np.exp(g) if is_log(metric) else -g if metric in BETTER_HIGH else g


def percent(effect: float) -> float:
    """A difference of logarithms as a change in percent, 100 (exp(effect) - 1)."""
    return 100 * math.expm1(effect)


@lru_cache(maxsize=4096)
def t_quantile(level: float, df: int) -> float:
    """Half-width of a two-sided Student-t interval of this level in standard errors."""
    return float(special.stdtrit(df, (1 + level) / 2))


def paired(differences: Sequence[float]) -> Effect:
    """Mean difference over blocks with its Student-t intervals and paired-t p (from n = 3).

    Differences that are all equal give an interval of no width, and p 1 if they are zero.
    """
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n == 0:
        return Effect(0, *[math.nan] * 7)
    mean = float(d.mean())
    if n < INTERVAL_FROM:
        return Effect(n, mean, float(d.std(ddof=1)) if n > 1 else math.nan, *[math.nan] * 5)
    sd = float(d.std(ddof=1))
    error = sd / math.sqrt(n)
    half95, half90 = t_quantile(0.95, n - 1) * error, t_quantile(0.90, n - 1) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return Effect(n, mean, sd, mean - half95, mean + half95, mean - half90, mean + half90, p)


def layout(values: NDArray[np.float64]) -> Layout:
    """Fits the additive two-way layout to values of shape (blocks, variants), nan for missing.

    The variants' effects solve the normal equations reduced for blocks (Searle 1971, ch. 7):
    C tau = Q with C = diag(n_j) - N' diag(1 / k_i) N, N the 0/1 table of what was measured, n_j
    and k_i its column and row sums. df = cells - blocks - rank(C).
    """
    rows = np.isfinite(values).any(axis=1)
    there = np.isfinite(values) & rows[:, None]
    y, seen = np.where(there, values, 0.0), there.astype(float)
    k = np.maximum(seen.sum(axis=1), 1)
    block_mean = y.sum(axis=1) / k
    reduced = np.diag(seen.sum(axis=0)) - seen.T @ (seen / k[:, None])
    quantities = np.where(there, y - block_mean[:, None], 0.0).sum(axis=0)
    tau = np.linalg.pinv(reduced, hermitian=True) @ quantities
    block = (np.where(there, y - tau, 0.0)).sum(axis=1) / k
    residuals = np.where(there, y - tau - block[:, None], np.nan)
    df = int(there.sum() - rows.sum() - np.linalg.matrix_rank(reduced, hermitian=True))
    variance = float(np.nansum(residuals**2) / df) if df > 0 else math.nan
    groups = [r[np.isfinite(r)] for r in residuals.T]
    groups = [g for g in groups if len(g) >= INTERVAL_FROM]
    scale = np.nanmax(np.abs(values[there])) if there.any() else 0.0
    varied = variance > (1e-12 * scale) ** 2  # all equal up to rounding: nothing to test
    equal_p = (float(stats.levene(*groups, center="median").pvalue)
               if varied and len(groups) > 2 else math.nan)
    return Layout(residuals, tau, variance, df, equal_p)


def pooled_interval(effect: float, n: int, fit: Layout, level: float = 0.95
                    ) -> tuple[float, float]:
    """effect +- t_df sqrt(2 s^2 / n) with s^2 the layout's residual mean square; nan below n = 3.

    It stands on more degrees of freedom than the paired interval but needs one residual variance
    for all variants; where the layout holds two variants both are the same.
    """
    if n < INTERVAL_FROM or fit.df < 1:
        return math.nan, math.nan
    half = t_quantile(level, fit.df) * math.sqrt(2 * fit.variance / n)
    return effect - half, effect + half


def band(fit: Layout, level: float = 0.95) -> NDArray[np.float64]:
    """Half-widths (variants,) of bands whose non-overlap means a paired difference at this level.

    t_df sqrt(s^2 / (2 n)): half of the pooled interval of a difference (Loftus and Masson 1994,
    difference-adjusted after Baguley 2012). nan below three blocks.
    """
    n = np.isfinite(fit.residuals).sum(axis=0)
    if fit.df < 1:
        return np.full(len(n), np.nan)
    half = t_quantile(level, fit.df) * np.sqrt(fit.variance / (2 * np.maximum(n, 1)))
    return np.where(n >= INTERVAL_FROM, half, np.nan)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided sign-flip p of mean zero: the share of the 2^n sign patterns whose |sum|
    reaches the observed one. nan outside 6 <= n <= 20; its floor is 2 / 2^n.
    """
    if not VERDICT_FROM <= len(differences) <= SIGN_FLIP_UP_TO:
        return math.nan
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    observed = abs(math.fsum(differences))
    tolerance = 1e-12 * math.fsum(abs(d) for d in differences)
    return float((np.abs(sums) >= observed - tolerance).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; nan stays out of the family."""
    family = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted, worst = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(family):
        worst = max(worst, min(1.0, (len(family) - rank) * value))
        adjusted[i] = worst
    return adjusted


def verdict(e: Effect, margin: float, diverged: tuple[int, int] = (0, 0),
            p_adjusted: float | None = None) -> str:
    """The verdict on the claim "the variant is worse than the baseline" (effect > 0).

    In this order: "tie" if the 90 % interval lies inside +-margin; "supported" if the 95 %
    interval lies above 0; "refuted" if its upper bound lies below margin; else "undecided".
    Unequal divergence (variant, baseline) bars "supported", as does an adjusted p of .05 or more.
    Below six blocks there is no verdict.
    """
    if e.n < VERDICT_FROM:
        return SCREENING
    if -margin < e.low90 and e.high90 < margin:
        return "tie"
    barred = diverged[0] != diverged[1] or (p_adjusted is not None and p_adjusted >= 0.05)
    if e.low > 0 and not barred:
        return "supported"
    return "refuted" if e.high < margin else "undecided"


def power(n: int, sd: float, effect: float, level: float = 0.95) -> float:
    """Chance that a paired t test on n blocks finds `effect` at this level (noncentral t)."""
    df, critical = n - 1, t_quantile(level, n - 1)
    shift = abs(effect) / sd * math.sqrt(n)
    # Left out: the far tail, which nct.cdf returns as nan for large shifts.
    return float(stats.nct.sf(critical, df, shift))


def seeds_needed(e: Effect, effect: float, chance: float = 0.8) -> int | None:
    """Blocks needed to find `effect` with this chance, at the spread seen; None below n = 6."""
    if e.n < VERDICT_FROM or effect == 0 or not e.sd > 0:
        return None
    low, high = 1, 2
    while power(high, e.sd, effect) < chance:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, e.sd, effect) >= chance else (middle, high)
    return high
