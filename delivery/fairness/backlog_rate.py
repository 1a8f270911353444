"""How much each backlog may let in while other deliveries go on beside it (pure).

Whoever has no backlog is to notice nothing of those who have, also where engine, server and
PostgreSQL share few cores. So beside prompt deliveries what is let in is a trickle, in small
chunks: at a rate that grows while the engine's loop is punctual and shrinks while it is not, and
with one in addition for every fourth of theirs, so that those with a backlog never get the less the
more there is of the others. Beside nobody there is no bound.

The rate is that of one config, however many have a backlog: one that is flooded stands out by it,
and hundreds that were only busy for a moment are through at once.
"""

from collections.abc import Callable
from time import monotonic

from core.backpressure import AimdLevel

#: Deliveries a second that a backlog lets in at least, and beyond which nothing is held back.
_LEAST_RATE = 50.0
_MOST_RATE = 10_000.0
#: What a backlog may let in for each prompt delivery of others.
_SHARE = 0.25
#: Others have deliveries for so long after one.
_BESIDE_SECONDS = 0.5
#: What is let in at a time: what fits this time, but a statement is worth a few.
_CHUNK_SECONDS = 0.03
_CHUNK_LEAST = 8


class BacklogRate:
    """What each backlog may let in, in one engine."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self.aimd = AimdLevel(_LEAST_RATE, _MOST_RATE)
        self._others_until = float("-inf")
        self._rests_until = float("-inf")

    @property
    def is_bounded(self) -> bool:
        """Whether others have deliveries at present."""
        return self._clock() < self._others_until

    def meet_others(self, count: int) -> None:
        """So many deliveries of configs without a backlog begin promptly."""
        if count:
            self._others_until = self._clock() + _BESIDE_SECONDS
            self._rests_until -= _SHARE * count / self.aimd.level

    def rest_seconds(self) -> float:
        """Until something may be let in again; 0 for now."""
        return max(self._rests_until - self._clock(), 0.0) if self.is_bounded else 0.0

    def chunk(self) -> int | None:
        """How many deliveries each config may let in now; None for all it can take."""
        if not self.is_bounded:
            return None
        return max(int(self.aimd.level * _CHUNK_SECONDS), _CHUNK_LEAST)

    def spend(self, count: int) -> None:
        """So many have been let in of the config that had most."""
        if self.is_bounded:
            begins = max(self._rests_until, self._clock())
            self._rests_until = begins + count / self.aimd.level
