"""Who publishes how much at present (pure).

A crowd is worth a look whether its receivers keep up; a flood must not be in the way of others. An
estimate of one process is enough: to look costs a little, to park is always safe, to wait, too.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic

from core.queue import CROWD

#: Events of one merchant in a second, from which on they are a flood.
FLOOD = 500


class Crowds:
    """Counts each merchant's events of the present second."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._second = 0
        self._counts: Counter[str] = Counter()

    def notice(self, merchant_ids: Iterable[str]) -> None:
        """Count one event for each of these."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            # A crowd thins out; it is not gone because a second is.
            self._counts = Counter({m: n // 2 for m, n in self._counts.items() if n > CROWD})
        for merchant_id in merchant_ids:
            self._counts[merchant_id] += 1

    def most_of(self, merchant_ids: Iterable[str]) -> int:
        """How many events the busiest of these merchants has in the present second."""
        counts = self._counts
        return max((counts[merchant_id] for merchant_id in merchant_ids), default=0)
