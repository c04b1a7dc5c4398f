"""analysis.stats against hand-worked values, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as sp

from analysis import stats

VERDICTS = [  # low, high, low90, high90, margin, verdict
    (-0.03, 0.04, -0.02, 0.03, 0.05, "tie"),
    (0.01, 0.04, 0.015, 0.035, 0.05, "tie"),  # above 0 too, but a tie comes first
    (0.02, 0.30, 0.04, 0.28, 0.05, "supported"),
    (-0.30, -0.02, -0.28, -0.04, 0.05, "refuted"),
    (-0.30, 0.04, -0.28, 0.02, 0.05, "refuted"),  # low90 leaves the margin
    (-0.10, 0.20, -0.08, 0.18, 0.05, "undecided"),
]


def effect(low: float, high: float, low90: float, high90: float, n: int = 6) -> stats.Effect:
    return stats.Effect(n, (low + high) / 2, 0.1, low, high, low90, high90, 0.5)


def test_transform_is_log_for_distances_and_identity_for_kid() -> None:
    assert stats.transform("fid", [math.e, 1.0]) == pytest.approx([1, 0])
    assert np.isnan(stats.transform("fid", [0.0, -1.0])).all()
    assert stats.transform("kid", [-0.01, 0.0]) == pytest.approx([-0.01, 0])
    assert stats.percent(math.log(1.12)) == pytest.approx(12)


def test_interval_by_hand() -> None:
    e = stats.paired([1.0, 2.0, 3.0])  # sd 1, t(.975, 2) = 4.302653, t(.95, 2) = 2.919986
    assert (e.n, e.effect, e.sd) == (3, 2.0, 1.0)
    assert e.high - e.effect == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert e.high90 - e.effect == pytest.approx(2.919986 / math.sqrt(3), rel=1e-6)


def test_paired_agrees_with_scipy() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 9)
    e, reference = stats.paired(d), sp.ttest_1samp(d, 0)
    interval = reference.confidence_interval(0.95)
    assert e.p == pytest.approx(reference.pvalue)
    assert (e.low, e.high) == pytest.approx((interval.low, interval.high))


def test_few_blocks_have_no_interval() -> None:
    for d in ([], [1.0], [1.0, 2.0]):
        e = stats.paired(d)
        assert e.n == len(d)
        assert math.isnan(e.low) and math.isnan(e.p)
    assert stats.paired([1.0, 2.0]).effect == 1.5


def test_equal_differences() -> None:
    assert stats.paired([0.0] * 4).p == 1.0
    e = stats.paired([0.5] * 4)
    assert (e.low, e.high, e.p) == (0.5, 0.5, 0.0)


def test_the_pooled_interval_of_six_variants_is_narrower() -> None:  # and holds: test_coverage
    rng = np.random.default_rng(12)
    widths, paired_widths = [], []
    for _ in range(200):
        y = rng.normal(0, 2, (3, 1)) + rng.normal(0, 0.3, (3, 6))
        e = stats.paired(y[:, 0] - y[:, 1])
        low, high = stats.pooled_interval(e.effect, 3, stats.layout(y))
        widths.append(high - low)
        paired_widths.append(e.high - e.low)
    assert np.mean(widths) < 0.7 * np.mean(paired_widths)


def test_pooled_interval_of_two_variants_is_the_paired_one() -> None:
    y = np.random.default_rng(1).normal(size=(5, 2))
    e, fit = stats.paired(y[:, 0] - y[:, 1]), stats.layout(y)
    assert fit.df == 4
    assert stats.pooled_interval(e.effect, 5, fit) == pytest.approx((e.low, e.high))
    # the bands of two variants just touch when the paired interval just reaches 0
    assert stats.band(fit).sum() == pytest.approx(e.high - e.effect)


def test_layout_with_holes_is_least_squares() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(6, 4))
    y[0, 1] = y[3, 3] = y[5, 0] = np.nan
    y[4] = np.nan
    fit = stats.layout(y)
    i, j = np.nonzero(np.isfinite(y))
    design = np.zeros((len(i), 10))
    design[np.arange(len(i)), i] = design[np.arange(len(i)), 6 + j] = 1
    solution, _, rank, _ = np.linalg.lstsq(design, y[i, j], rcond=None)
    assert fit.residuals[i, j] == pytest.approx(y[i, j] - design @ solution, abs=1e-10)
    assert fit.df == len(i) - rank


def test_layout_of_disconnected_variants() -> None:
    y = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, 3.0]])
    assert stats.layout(y).df == 0
    assert math.isnan(stats.pooled_interval(0.0, 3, stats.layout(y))[0])


def test_unequal_variances_are_noticed() -> None:
    rng = np.random.default_rng(3)
    spread = np.array([0.05, 0.05, 0.05, 3.0])
    assert stats.layout(rng.normal(size=(20, 4)) * spread).equal_variances_p < 0.01
    assert stats.layout(rng.normal(size=(20, 4))).equal_variances_p > 0.05


def test_sign_flip_floor() -> None:
    assert stats.sign_flip_p([1.0, 2, 3, 4, 5, 6]) == 2 / 2**6
    assert stats.sign_flip_p([-0.1] * 8) == 2 / 2**8
    assert math.isnan(stats.sign_flip_p([1.0] * 5))
    assert stats.sign_flip_p([0.0] * 6) == 1.0


def test_sign_flip_agrees_with_scipy() -> None:
    d = np.random.default_rng(4).normal(0.4, 1, 9)
    reference = sp.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert stats.sign_flip_p(d) == pytest.approx(reference.pvalue)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = stats.holm([0.5, math.nan, 0.02])  # nan is no member of the family
    assert adjusted[0] == 0.5 and adjusted[2] == pytest.approx(0.04) and math.isnan(adjusted[1])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(("low", "high", "low90", "high90", "margin", "expected"), VERDICTS)
def test_verdicts(low: float, high: float, low90: float, high90: float, margin: float,
                  expected: str) -> None:
    e = effect(low, high, low90, high90)
    assert stats.verdict(e, margin) == expected
    assert stats.verdict(effect(low, high, low90, high90, n=5), margin) == stats.SCREENING


def test_what_bars_supported() -> None:
    e = effect(0.1, 0.3, 0.12, 0.28)
    assert stats.verdict(e, 0.05) == "supported"
    assert stats.verdict(e, 0.05, diverged=(1, 1)) == "supported"
    assert stats.verdict(e, 0.05, diverged=(0, 1)) == "undecided"
    assert stats.verdict(e, 0.05, p_adjusted=0.2) == "undecided"


def test_power_against_tables_and_simulation() -> None:
    # Cohen 1988: d = .5, two-sided .05, power .80 needs 34 pairs; d = .8 needs 15
    six = stats.paired([1.0, -1, 1, -1, 1, -1])
    assert stats.seeds_needed(six, 0.5 * six.sd) == 34
    assert stats.seeds_needed(six, 0.8 * six.sd) == 15
    assert stats.seeds_needed(stats.paired([1.0, 2, 3]), 0.5) is None
    d = np.random.default_rng(5).normal(1.2, 1, (4000, 8))
    found = np.mean(sp.ttest_1samp(d, 0, axis=1).pvalue < 0.05)
    assert stats.power(8, 1.0, 1.2) == pytest.approx(found, abs=0.02)
