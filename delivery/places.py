"""How many attempts each webhook config may have open in this engine (pure).

A place is worth most where it comes back soon. So a config begins with a few, gets one more with
every answer and half of them with every failure; and of the engine's places, those that have yet to
prove themselves hold no more than half together, however many they are, and those that have failed
last a quarter, so that a newcomer finds room among them. One that fails several times in a row
is left alone for a moment each time, since a failure may come back at once and cost us most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

#: What a config begins with; nobody who has fewer open is held up by those who have more.
FEW = 4
#: Attempts are open and none has ended for so long: nothing proves that any of them will.
_SILENT_SECONDS = 2.0
#: Failures in a row after which a config rests, longer with each, up to half a second: an outage
#: costs its deliveries few of their attempts, and its end is still seen soon.
_FAILURES_BEFORE_REST = 3
_FIRST_REST_SECONDS = 0.05
_LONGEST_REST_SECONDS = 0.5
#: Configs remembered; past this, those without an open attempt begin anew.
_MEMORY = 50_000


@dataclass(slots=True)
class _Standing:
    """What one config has shown so far."""

    limit: int
    open: int = 0
    #: Whether the last attempt that ended found a receiver that works.
    proven: bool = False
    is_new: bool = True
    #: When an attempt ended last, or the first of the open ones began.
    heard_at: float = 0.0
    #: In a row.
    failures: int = 0
    rests_until: float = 0.0


class Places:
    """Counts open attempts, and learns from how they end."""

    def __init__(self, total: int, most: int, clock: Callable[[], float] = monotonic):
        self._total = total
        #: The last eighth is for those with few open, so that one who falls silent, with many,
        #: leaves the others room until it has been noticed.
        self.reserve = total // 8
        self._most = most
        self._clock = clock
        self._standings: dict[UUID, _Standing] = {}
        self._busy: dict[UUID, _Standing] = {}
        self._open = 0
        # Places of unproven configs, as of the last survey and what began since.
        self._doubtful = 0

    def survey(self) -> None:
        """Look who has fallen silent; to be called before places are given away."""
        self._doubtful = sum(s.open for s in self._busy.values() if not self._is_proven(s))

    def free(self, webhook_id: UUID, own_cap: int) -> int:
        """Attempts that may begin now, by the config's own cap (0: none) and what it has shown."""
        standing = self._standings.get(webhook_id) or self._newcomer()
        if standing.rests_until and standing.rests_until > self._clock():
            return 0
        limit = min(standing.limit, self._most, own_cap or self._most)
        if self._is_proven(standing):
            spare = self._total - self.reserve - self._open
            limit = min(limit, max(FEW, standing.open + spare))
            return max(limit - standing.open, 0)
        newcomer = standing.is_new and not self._is_silent(standing)
        share = max(self._total // (2 if newcomer else 4), 1)
        limit = min(limit, FEW if self._doubtful < share // 2 else 1)
        return max(min(limit - standing.open, share - self._doubtful), 0)

    def wanted(self, webhook_id: UUID, own_cap: int) -> int:
        """How many deliveries it could have on their way; 0 until half of that are free.

        One by one they would be let in by a statement each.
        """
        free = self.free(webhook_id, own_cap)
        places = free + self.open(webhook_id)
        return places if 2 * free >= places else 0

    def open(self, webhook_id: UUID) -> int:
        standing = self._standings.get(webhook_id)
        return standing.open if standing else 0

    def begin(self, webhook_id: UUID) -> None:
        if len(self._standings) > _MEMORY:
            self._standings = dict(self._busy)
        standing = self._standings.setdefault(webhook_id, self._newcomer())
        if not standing.open:
            standing.heard_at = self._clock()
            self._busy[webhook_id] = standing
        if not self._is_proven(standing):
            self._doubtful += 1
        standing.open += 1
        self._open += 1

    def end(self, webhook_id: UUID, works: bool | None) -> float:
        """An attempt has ended; `works` is what it says of the receiver, None for nothing.

        Returns for how many seconds the config rests herewith, mostly 0.
        """
        standing = self._busy[webhook_id]
        standing.open -= 1
        now = standing.heard_at = self._clock()
        self._open -= 1
        if not standing.open:
            del self._busy[webhook_id]
        if works is None:
            return 0.0
        standing.is_new = False
        standing.proven = works
        if works:
            standing.limit = min(standing.limit + 1, self._most)
            standing.failures, standing.rests_until = 0, 0.0
            return 0.0
        standing.limit = max(standing.limit // 2, 1)
        standing.failures += 1
        rest = _rest_seconds(standing.failures)
        standing.rests_until = now + rest
        return rest

    def restart(self, webhook_id: UUID) -> None:
        """Its breaker is half-open: one place, and from there on as its attempts end."""
        standing = self._standings.setdefault(webhook_id, self._newcomer())
        standing.limit = 1
        standing.is_new = standing.proven = False
        standing.failures, standing.rests_until = 0, 0.0

    def _newcomer(self) -> _Standing:
        return _Standing(limit=min(FEW, self._most))

    def _is_proven(self, standing: _Standing) -> bool:
        return standing.proven and not self._is_silent(standing)

    def _is_silent(self, standing: _Standing) -> bool:
        return standing.open > 0 and self._clock() - standing.heard_at > _SILENT_SECONDS


def _rest_seconds(failures: int) -> float:
    further = failures - _FAILURES_BEFORE_REST
    if further < 0:
        return 0.0
    # Bounded before it is raised to a power: a streak may be long.
    return min(_FIRST_REST_SECONDS * 2.0 ** min(further, 10), _LONGEST_REST_SECONDS)
