"""Means and paired differences over seeds, against numbers worked out by hand."""

import pytest

from analysis.seeds import mean_and_deviation, paired_interval


def test_the_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.302653, so 2 -+ 4.302653 / sqrt(3) = 2 -+ 2.484138.
    mean, low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    assert paired_interval([1.0], [0.0]) == (1.0, None, None)


def test_the_deviation_is_the_sample_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_deviation([1.0]) == (1.0, None)
