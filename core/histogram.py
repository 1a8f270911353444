"""What the processes count of themselves: plain numbers, which an event costs well under 1 us.

Whoever publishes them turns them into metrics when it is asked (`cli`), and counts nothing itself.
"""

from bisect import bisect_left
from collections.abc import Sequence

#: Bounds in seconds, of statements and calls.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
#: Of requests to receivers, which may take 30 s.
REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
#: Of ways that retries and backlogs make long.
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 600.0, 3600.0)


class Histogram:
    """How often a value fell between which bounds; a bound belongs to what is below it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        #: Of each bound those above the one before, and at last those above all of them.
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
