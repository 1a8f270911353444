"""Stage: parked deliveries are let in as their webhook configs have room.

Those that an engine knows to wait for it are refilled as soon as half their places are free, by
chunks. Beside that every engine looks at all backlogs every second, so that nothing depends on what
one of them knows, or on its being alive.
"""

from collections.abc import Callable, Iterable
from uuid import UUID

from core import queue
from core.db import Pool


class Admission:
    """The backlogs that wait for this engine: those it met since the sweep before the last one."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._known: set[UUID] = set()
        self._met: set[UUID] = set()

    def meet(self, webhook_ids: Iterable[UUID]) -> None:
        """These configs have parked deliveries, as a claim found or left them."""
        self._met.update(webhook_ids)
        self._known |= self._met

    @property
    def is_awaited(self) -> bool:
        return bool(self._known)

    async def refill(self, wanted: Callable[[UUID], int]) -> None:
        """Let in what the configs that wait for us can take now; `wanted` says how many of each."""
        # One that is not fed may lack room instead of a backlog, so it is asked for again.
        self._met |= await self._admit(self._known, wanted)

    async def sweep(self, wanted: Callable[[UUID], int]) -> bool:
        """The same for every config that has a backlog; whether anything was let in."""
        backlogs = await queue.webhooks_with_backlog(self._pool)
        admitted = await self._admit(backlogs, wanted)
        self._known = self._met | admitted
        self._met = set()
        return bool(admitted)

    async def _admit(self, webhook_ids: Iterable[UUID], wanted: Callable[[UUID], int]) -> set[UUID]:
        places = {w: count for w in webhook_ids if (count := wanted(w)) > 0}
        return await queue.admit(self._pool, places) if places else set()
