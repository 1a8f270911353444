"""Who publishes so much at present that it is worth a look whether its receivers keep up (pure).

An estimate of one process, which is enough: to look costs a little, and to park is always safe.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic

from core.queue import CROWD


class Crowds:
    """Counts each merchant's events of the present second."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._second = 0
        self._counts: Counter[str] = Counter()

    def notice(self, merchant_ids: Iterable[str]) -> bool:
        """Count one event for each of these; whether one of the merchants has become a crowd."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            # A crowd thins out; it is not gone because a second is.
            self._counts = Counter({m: n // 2 for m, n in self._counts.items() if n > CROWD})
        crowd = False
        for merchant_id in merchant_ids:
            self._counts[merchant_id] += 1
            crowd |= self._counts[merchant_id] > CROWD
        return crowd
