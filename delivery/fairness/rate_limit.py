"""How many webhooks the rate limits of their configs let through.

The rates themselves are kept in PostgreSQL, so that a limit holds for all engines together. This
spares it the questions whose answer is known, and gathers the ends of the waits, so that however
many configs are limited, an engine asks for all of them at once a few times a second.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from uuid import UUID

from core import queue
from core.postgres.protocols import Pool

#: Waits end at multiples of this.
_TICK_SECONDS = 0.1
#: A limit may be raised meanwhile, so nobody waits longer before asking again.
_LONGEST_SECONDS = 1.0


class RateHolds:
    """Config by config, the time before which it gets no more (pure)."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._until: dict[UUID, float] = {}

    def hold(self, waits: Iterable[tuple[UUID, float]]) -> set[float]:
        """Hold each config for at least so many seconds; returns in how many the holds end."""
        now = self._clock()
        self._until = {webhook_id: end for webhook_id, end in self._until.items() if end > now}
        ends = {webhook_id: _next_tick(now + min(s, _LONGEST_SECONDS)) for webhook_id, s in waits}
        self._until |= ends
        return {end - now for end in ends.values()}

    def breaker_is_open(self, webhook_id: UUID) -> bool:
        return self._until.get(webhook_id, -math.inf) > self._clock()


class RateLimits:
    """Asks for leave to send, and has the engine woken when there may be more of it."""

    def __init__(
        self,
        pool: Pool,
        wake_in: Callable[[float], None],
        clock: Callable[[], float] = monotonic,
    ):
        self._pool = pool
        self._wake_in = wake_in
        self._holds = RateHolds(clock)

    def breaker_is_open(self, webhook_id: UUID) -> bool:
        """Whether it is known that this config gets nothing at present."""
        return self._holds.breaker_is_open(webhook_id)

    async def grant(self, wanted: Mapping[UUID, int]) -> Counter[UUID]:
        """How many of what is wanted may be sent now; it counts as sent. One statement at most."""
        if not wanted:
            return Counter()
        granted = await queue.spend_rate(self._pool, wanted)
        waits = []
        for webhook_id, count in wanted.items():
            allowed, next_in = granted.get(webhook_id, (0, 0.0))
            if allowed < count:
                waits.append((webhook_id, next_in))
        for seconds in self._holds.hold(waits):
            self._wake_in(seconds)
        return Counter({webhook_id: allowed for webhook_id, (allowed, _) in granted.items()})


def _next_tick(moment: float) -> float:
    return (math.floor(moment / _TICK_SECONDS) + 1) * _TICK_SECONDS
