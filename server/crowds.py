"""Who publishes how much at present (pure).

A crowd is worth a look whether its receivers keep up; a flood must not be in the way of others. An
estimate of one process is enough: to look costs a little, to park is always safe, to wait, too.
"""

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
        self._counts: dict[str, int] = {}

    def notice(self, merchant_ids: Iterable[str]) -> int:
        """Count one event for each of these; how many the busiest of them has in this second."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            # A crowd thins out; it is not gone because a second is.
            self._counts = {m: n // 2 for m, n in self._counts.items() if n > CROWD}
        counts, most = self._counts, 0
        for merchant_id in merchant_ids:
            count = counts[merchant_id] = counts.get(merchant_id, 0) + 1
            most = max(most, count)
        return most

    def most_of(self, merchant_ids: Iterable[str]) -> int:
        """How many events the busiest of these merchants has in the present second."""
        return max((self._counts.get(merchant_id, 0) for merchant_id in merchant_ids), default=0)
