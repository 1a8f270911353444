"""Detects bursts and floods: counts the events of each merchant in the current second. Pure.

In a burst, enqueue() also counts the due deliveries of a config. A flood gets separate commits. An
estimate of one process is enough, because both are only slower for a merchant that has no burst.
"""

from collections.abc import Callable, Iterable
from time import monotonic

from core.queue import BURST_EVENTS

#: Events of one merchant per second, above which they are a flood.
FLOOD_EVENTS = 500


class PublishRates:
    """Events per merchant in the current second."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._second = 0
        self._counts: dict[str, int] = {}

    def count(self, merchant_ids: Iterable[str]) -> int:
        """Count an event for each of these, and return the number of the busiest merchant."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            # Halved instead of cleared, because a burst does not end with a second.
            self._counts = {m: n // 2 for m, n in self._counts.items() if n > BURST_EVENTS}
        counts, highest = self._counts, 0
        for merchant_id in merchant_ids:
            count = counts[merchant_id] = counts.get(merchant_id, 0) + 1
            highest = max(highest, count)
        return highest

    def highest(self, merchant_ids: Iterable[str]) -> int:
        """Return the number of events of the busiest of these merchants."""
        return max((self._counts.get(merchant_id, 0) for merchant_id in merchant_ids), default=0)
