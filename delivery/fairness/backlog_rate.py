"""Limits how fast each backlog is admitted while other deliveries start promptly. Pure.

Engine, server and PostgreSQL may share few cores, so that a backlog delays every other delivery.
While others have prompt deliveries, each backlog is admitted in small chunks at a rate that adapts
to event-loop lag (AIMD). One more is admitted for every fourth prompt delivery of others, so that
heavy traffic of others does not starve a backlog. Without others there is no limit.

The rate applies to each config. So it slows a flooded config, while hundreds of configs with short
backlogs clear at once.
"""

from collections.abc import Callable
from time import monotonic

from core.backpressure import AimdLevel

#: Deliveries per second of one backlog.
_RATE_MIN = 50.0
_RATE_MAX = 10_000.0
#: Deliveries that a backlog may admit per prompt delivery of others.
_SHARE = 0.25
#: Others count as active for this long after one of their deliveries started.
_ACTIVE_SECONDS = 0.5
#: A chunk is the rate times this, but at least _CHUNK_MIN, because each costs one statement.
_CHUNK_SECONDS = 0.03
_CHUNK_MIN = 8


class BacklogRate:
    """The admission rate of each backlog in one engine."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self.aimd = AimdLevel(_RATE_MIN, _RATE_MAX)
        self._others_active_until = float("-inf")
        self._next_at = float("-inf")

    @property
    def is_limited(self) -> bool:
        """Whether other configs have prompt deliveries at present."""
        return self._clock() < self._others_active_until

    def others_started(self, count: int) -> None:
        """Count prompt deliveries of configs without a backlog."""
        if count:
            self._others_active_until = self._clock() + _ACTIVE_SECONDS
            self._next_at -= _SHARE * count / self.aimd.level

    def seconds_until_next(self) -> float:
        """Return the seconds until the next admission, or 0."""
        return max(self._next_at - self._clock(), 0.0) if self.is_limited else 0.0

    def chunk_size(self) -> int | None:
        """Return how many deliveries each config may admit now, or None without a limit."""
        if not self.is_limited:
            return None
        return max(int(self.aimd.level * _CHUNK_SECONDS), _CHUNK_MIN)

    def admitted(self, count: int) -> None:
        """Count an admission by the config that had the most deliveries in it."""
        if self.is_limited:
            start = max(self._next_at, self._clock())
            self._next_at = start + count / self.aimd.level
