"""How many attempts each webhook config may have open in this engine (pure).

A place is worth most where it comes back soon. So a config begins with a few, gets one more with
every answer and half of them with every failure; and of the engine's places, those that have yet to
prove themselves hold no more than half together, however many they are, and those that have failed
last a quarter, so that a newcomer finds room among them. One that fails several times in a row
is left alone for a moment each time, since a failure may come back at once and cost us most.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


class ConcurrencyLimiter:
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


# How many attempts an engine may still begin, and when it is worth asking for that many.

#: How long to wait for more free places before a claim for few.
_GATHER_SECONDS = 0.01
#: Results on their way into the database that do not hold back new attempts.
_UNSETTLED_FREE = 500


class InFlightBudget:
    """Counts attempts that run, results that are not on record, and what claims have asked for.

    `most` attempts in all, the last `reserve` of them for configs with few open; `batch` is the
    most that one claim asks for.
    """

    def __init__(self, most: int, reserve: int, batch: int):
        self._most = most
        self._reserve = reserve
        # No claim takes more than half of all places, so that two of them share the engine.
        self._batch = min(batch, (most + 1) // 2)
        self._worthwhile = reserve + max(min(batch, most) // 4, 1)
        self._running = self._unsettled = self._asked = 0
        self._grew = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Nobody waits any more."""
        self._closed = True
        self._grew.set()

    def attempt_began(self) -> None:
        self._running += 1

    def attempt_ended(self) -> None:
        """Its result is still to be settled()."""
        self._running -= 1
        self._unsettled += 1
        self._grew.set()

    def settled(self, count: int) -> None:
        self._unsettled -= count
        self._grew.set()

    @contextmanager
    def asking_for(self, count: int) -> Iterator[None]:
        """While a claim for so many is under way, no other one asks for the same room."""
        self._asked += count
        try:
            yield
        finally:
            self._asked -= count

    async def wait(self) -> int:
        """How many to claim: at once when many may be, else what is free after a short wait.

        Places become free one by one, and a claim costs nearly the same for one as for many. What
        is kept for configs with few open is asked for only when nothing else gets free: most of
        what a claim brings would have to be parked.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_SECONDS):
                while self._free() < self._worthwhile and not self._closed:
                    self._grew.clear()
                    await self._grew.wait()
        free = self._free()
        spare = free - self._reserve
        return min(spare if spare > 0 else free, self._batch)

    def _free(self) -> int:
        """Results that wait for the database take places, too, but not before there are more of
        them than one settle takes."""
        waiting = max(self._unsettled - _UNSETTLED_FREE, 0)
        return self._most - self._running - self._asked - waiting
