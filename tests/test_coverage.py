"""The intervals of the report hold the truth as often as they say, where their assumptions do."""

from __future__ import annotations

import pytest

from analysis.coverage import coverage

STUDIES = 1500
ERROR = (0.95 * 0.05 / STUDIES) ** 0.5


@pytest.mark.parametrize("n", [3, 6, 10])
def test_normal_noise(n: int) -> None:
    for share in coverage("normal", n, STUDIES, seed=1):
        assert abs(share - 0.95) < 3.5 * ERROR


def test_skewed_noise_costs_little_since_differences_are_symmetric() -> None:
    for n in (3, 6, 10):
        assert coverage("skewed", n, STUDIES)[0] > 0.93


def test_unequal_variances_mislead_the_pooled_interval_and_not_the_paired_one() -> None:
    paired, pooled = coverage("loud among quiet", 6, STUDIES)
    assert abs(paired - 0.95) < 3.5 * ERROR and pooled < 0.9
    paired, pooled = coverage("quiet among loud", 6, STUDIES)
    assert abs(paired - 0.95) < 3.5 * ERROR and pooled > 0.99
