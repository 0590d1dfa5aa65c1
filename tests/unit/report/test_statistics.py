"""Intervals and corrections against published worked examples."""

from __future__ import annotations

import math

import pytest

from megatron_btx.report.statistics import adjust_by_holm, paired_interval

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Hours of sleep that one drug gave ten patients more than another (Student 1908, section IX; Cushny and Peebles)."""


def test_the_interval_is_that_of_students_example():
    """R's help on t.test prints for these data t = 4.0621, p-value = 0.002833, interval 0.7001142 to 2.4598858."""
    found = paired_interval(SLEEP)
    assert found.mean == pytest.approx(1.58) and found.seeds == 10
    assert found.low == pytest.approx(0.7001142, abs=1e-7) and found.high == pytest.approx(2.4598858, abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=5e-7)


@pytest.mark.parametrize(("seeds", "factor"), [(2, 8.985), (3, 2.484), (4, 1.591), (5, 1.242)])
def test_few_seeds_have_wide_intervals(seeds, factor):
    """Half-width in standard deviations: t(.975, n - 1) / sqrt(n) of the printed tables."""
    differences = [1.0 * (-1) ** number for number in range(seeds)]
    mean = sum(differences) / seeds
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (seeds - 1))
    assert paired_interval(differences).half_width / deviation == pytest.approx(factor, abs=1e-3)


def test_one_seed_says_nothing_of_others():
    found = paired_interval([0.3])
    assert (found.mean, found.half_width, found.p) == (0.3, math.inf, 1.0)
    with pytest.raises(ValueError, match="no differences"):
        paired_interval([])


def test_equal_differences():
    assert paired_interval([0.5, 0.5, 0.5])[1:] == (0.0, 3, 0.0)
    assert paired_interval([0.0, 0.0])[1:] == (0.0, 2, 1.0)


def test_the_correction_is_that_of_a_printed_example():
    """p .01, .04, .03, .005: the first and the last are rejected, as in the usual textbook example of Holm's method."""
    found = adjust_by_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(found) == ["a", "b", "c", "d"]
    assert list(found.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_by_holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and adjust_by_holm({}) == {}
