"""How many attempts an engine may still begin, and when it is worth asking for that many."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

#: How long to wait for more free places before a claim for few.
_GATHER_SECONDS = 0.01
#: Results on their way into the database that do not hold back new attempts.
_UNSETTLED_FREE = 500


class Room:
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
