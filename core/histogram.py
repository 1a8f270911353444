"""Histograms of plain numbers. An observation costs well under 1 us.

cli/metrics turns them into Prometheus metrics at each scrape.
"""

from bisect import bisect_left
from collections.abc import Sequence

#: Bounds in seconds, for statements and calls.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: For requests to receivers, which may take 30 s.
REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
#: For times that include retries and backlogs.
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 600.0, 3600.0)


class Histogram:
    """Counts values between bounds. A bound is inclusive, as in Prometheus."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        #: One count per bound, and one for values above all bounds.
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
