"""Stage: results into the database, as many at a time as have come in since the last write.

A result is kept until a settle took it or its lease was lost: a database that is away delays
results and loses none. Both ends of an ambiguous commit are safe, since settles are fenced.
"""

import asyncio
from collections.abc import Callable, Sequence

import asyncpg
import structlog

from core import queue
from core.db import RETRYABLE_ERRORS, Pool
from core.ids import format_id
from core.queue import Settled, Settlement

#: Settlements in one statement; more wait for the next one.
_BATCH_MAX = 500
_RETRY_SECONDS = 0.5

log = structlog.get_logger()


class Recorder:
    """Collects settlements and writes them in batches, in order of arrival."""

    def __init__(
        self,
        pool: Pool,
        max_consecutive_failures: int,
        on_settled: Callable[[Sequence[Settlement], Settled], None],
    ):
        self._pool = pool
        self._max_consecutive_failures = max_consecutive_failures
        self._on_settled = on_settled
        self._pending: list[Settlement] = []
        # A settle met somebody's lock: look for what is held before each, until nothing is.
        self._wary = False
        self._arrived = asyncio.Event()

    def put(self, settlement: Settlement) -> None:
        self._pending.append(settlement)
        self._arrived.set()

    async def run(self) -> None:
        """Write until cancelled; what is pending then is still there for flush()."""
        while True:
            await self._arrived.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write everything pending, waiting for the database as long as it takes."""
        while self._pending:
            batch = self._pending[:_BATCH_MAX]
            for part, settled in await self._settle(batch):
                await self._promote(settled)
                self._on_settled(part, settled)
            del self._pending[: len(batch)]
        self._arrived.clear()

    async def _settle(
        self, batch: Sequence[Settlement]
    ) -> list[tuple[Sequence[Settlement], Settled]]:
        while True:
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    held = await queue.held(connection, batch) if self._wary else frozenset()
                    free = [s for s in batch if s.delivery_id not in held]
                    settled = await queue.settle(connection, free, self._max_consecutive_failures)
                self._wary = bool(held)
                await self._postpone([s for s in batch if s.delivery_id in held], not free)
                return [(free, settled)]
            except (*RETRYABLE_ERRORS, asyncpg.PostgresError) as error:
                if _concerns_everything(error):
                    log.warning("settle_retried", pending=len(self._pending), error=repr(error))
                    await asyncio.sleep(_RETRY_SECONDS)
                elif isinstance(error, asyncpg.LockNotAvailableError) and not self._wary:
                    self._wary = True
                elif len(batch) > 1:
                    # One bad row must not take the others with it.
                    return [part for one in batch for part in await self._settle([one])]
                else:
                    return self._set_aside(batch[0], error)

    async def _promote(self, settled: Settled) -> None:
        if settled.ended_chains:
            try:
                await queue.promote(self._pool, settled.ended_chains)
            except RETRYABLE_ERRORS as error:
                # The sweep will find them; only later.
                log.warning("promote_failed", error=repr(error))

    async def _postpone(self, held: Sequence[Settlement], nothing_else: bool) -> None:
        """Somebody holds the rows or the configs of these, perhaps for long; only they wait."""
        if held:
            log.warning("settle_postponed", deliveries=len(held))
            self._pending += held
        if held and nothing_else:
            await asyncio.sleep(_RETRY_SECONDS)

    def _set_aside(
        self, settlement: Settlement, error: BaseException
    ) -> list[tuple[Sequence[Settlement], Settled]]:
        delivery_id = format_id("dlv", settlement.delivery_id)
        if isinstance(error, asyncpg.LockNotAvailableError):
            log.warning("settle_postponed", deliveries=1)
            self._pending.append(settlement)
            return []
        log.error("settle_refused", delivery_id=delivery_id, error=repr(error))
        return [([settlement], Settled(frozenset(), ()))]


def _concerns_everything(error: BaseException) -> bool:
    """Whether the database is to blame, and not one row of the batch."""
    return isinstance(error, RETRYABLE_ERRORS) and not isinstance(
        error, asyncpg.LockNotAvailableError
    )
