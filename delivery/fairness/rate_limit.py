"""Asks PostgreSQL for the rate limits of webhook configs, and remembers the answers.

The rates are kept in PostgreSQL, so that a limit holds for all engines together. A config whose
rate is used up is not asked for until its pause ends. Pauses end at common ticks, so that an engine
asks for all limited configs in a few statements per second.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from uuid import UUID

from core import queue
from core.postgres.protocols import Executor

#: Pauses end at multiples of this.
_TICK_SECONDS = 0.1
#: The limit may be raised in between, so a pause is not longer than this.
_LONGEST_SECONDS = 1.0


class RatePauses:
    """The time until which each config gets no more webhooks. Pure."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._until: dict[UUID, float] = {}

    def pause(self, waits: Iterable[tuple[UUID, float]]) -> set[float]:
        """Pause configs for at least these seconds, and return when each pause ends, in seconds."""
        now = self._clock()
        self._until = {webhook_id: end for webhook_id, end in self._until.items() if end > now}
        ends = {webhook_id: _next_tick(now + min(s, _LONGEST_SECONDS)) for webhook_id, s in waits}
        self._until |= ends
        return {end - now for end in ends.values()}

    def is_paused(self, webhook_id: UUID) -> bool:
        return self._until.get(webhook_id, -math.inf) > self._clock()


class RateLimits:
    """Takes tokens from the rate limits. `wake_in` wakes the engine after so many seconds."""

    def __init__(
        self,
        database: Executor,
        wake_in: Callable[[float], None],
        clock: Callable[[], float] = monotonic,
    ):
        self._database = database
        self._wake_in = wake_in
        self._pauses = RatePauses(clock)

    def is_paused(self, webhook_id: UUID) -> bool:
        """Return whether the config's rate is known to be used up."""
        return self._pauses.is_paused(webhook_id)

    async def take(self, wanted: Mapping[UUID, int]) -> Counter[UUID]:
        """Return how many webhooks may be sent now. They count as sent. Runs one statement."""
        if not wanted:
            return Counter()
        granted = await queue.spend_rate(self._database, wanted)
        waits = []
        for webhook_id, count in wanted.items():
            allowed, next_in = granted.get(webhook_id, (0, 0.0))
            if allowed < count:
                waits.append((webhook_id, next_in))
        for seconds in self._pauses.pause(waits):
            self._wake_in(seconds)
        return Counter({webhook_id: allowed for webhook_id, (allowed, _) in granted.items()})


def _next_tick(moment: float) -> float:
    return (math.floor(moment / _TICK_SECONDS) + 1) * _TICK_SECONDS
