"""Histograms: a bound belongs to what is below it, and nothing is lost above the last."""

from core.histogram import Histogram


def test_values_fall_between_their_bounds() -> None:
    histogram = Histogram((1, 2, 5))

    for value in (0, 1, 1.5, 2, 5, 5.1, 100):
        histogram.observe(value)

    assert histogram.counts == [2, 2, 1, 2]
    assert histogram.total == 114.6
