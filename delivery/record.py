"""Stage: writes results to the database, in batches of all that arrived since the last write.

A result is kept until it is settled or its lease is lost, so an unavailable database delays results
and loses none. A settle can be repeated after a lost response, because leases fence it. Changes of
breakers are written first, so that no delivery is claimed in between.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from uuid import UUID

import asyncpg
import structlog

from core import queue
from core.ids import format_id
from core.postgres.pool import RETRYABLE_ERRORS, met_new_partition
from core.postgres.protocols import Executor, Pool
from core.queue import BreakerChange, Settlement, SettleResult
from delivery.metrics import EngineMetrics
from delivery.settings import DeliverySettings

#: Settlements in one statement.
_BATCH_MAX = 500
_RETRY_SECONDS = 0.5

log = structlog.get_logger()


class Recorder:
    """Collects settlements and writes them in batches, in order of arrival."""

    def __init__(
        self,
        pool: Pool,
        settings: DeliverySettings,
        metrics: EngineMetrics,
        on_settled: Callable[[Sequence[Settlement], SettleResult], None],
    ):
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._on_settled = on_settled
        self._pending: list[Settlement] = []
        # Another session locked rows that a settle needs. Until it releases them, each settle first
        # searches for locked rows.
        self._rows_are_locked = False
        self._changes: dict[UUID, BreakerChange] = {}
        # The same for the configs of breakers.
        self._webhooks_are_locked = False
        self._arrived = asyncio.Event()

    @property
    def pending(self) -> int:
        """The number of results that are not recorded yet."""
        return len(self._pending)

    def put(self, settlement: Settlement, change: BreakerChange | None = None) -> None:
        """Add a result, and the change of its config's breaker."""
        self._pending.append(settlement)
        if change is not None:
            _merge(self._changes, change)
        self._arrived.set()

    async def run(self) -> None:
        """Write until cancelled. Results that are pending then remain for flush()."""
        while True:
            await self._arrived.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write all pending results, however long the database is unavailable."""
        while self._pending:
            await self._change_breakers()
            batch = self._pending[:_BATCH_MAX]
            for part, settled in await self._settle(batch):
                await self._promote(settled)
                self._on_settled(part, settled)
            del self._pending[: len(batch)]
        self._arrived.clear()

    async def _settle(
        self, batch: Sequence[Settlement]
    ) -> list[tuple[Sequence[Settlement], SettleResult]]:
        while True:
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    held = (
                        await queue.held(connection, batch)
                        if self._rows_are_locked
                        else frozenset()
                    )
                    free = [s for s in batch if s.delivery_id not in held]
                    began = perf_counter()
                    settled = await queue.settle(
                        connection, free, self._settings.max_consecutive_failures
                    )
                # Includes the commit, which takes most of the time.
                self._metrics.settle.observe(perf_counter() - began)
                self._rows_are_locked = bool(held)
                await self._postpone([s for s in batch if s.delivery_id in held], not free)
                return [(free, settled)]
            except (*RETRYABLE_ERRORS, asyncpg.PostgresError) as error:
                if met_new_partition(error):
                    continue
                if _is_database_failure(error):
                    log.warning("settle_retried", pending=len(self._pending), error=repr(error))
                    await asyncio.sleep(_RETRY_SECONDS)
                elif isinstance(error, asyncpg.LockNotAvailableError) and not self._rows_are_locked:
                    self._rows_are_locked = True
                elif len(batch) > 1:
                    # One bad row must not fail the others.
                    return [part for one in batch for part in await self._settle([one])]
                else:
                    return self._set_aside(batch[0], error)

    async def _promote(self, settled: SettleResult) -> None:
        if settled.ended_chains:
            try:
                await queue.promote(self._pool, settled.ended_chains)
            except RETRYABLE_ERRORS as error:
                # The sweep promotes them later.
                log.warning("promote_failed", error=repr(error))

    async def _postpone(self, held: Sequence[Settlement], nothing_else: bool) -> None:
        """Keep deliveries whose rows or configs another session has locked. Only they wait."""
        if held:
            log.warning("settle_postponed", deliveries=len(held))
            self._pending += held
        if held and nothing_else:
            await asyncio.sleep(_RETRY_SECONDS)

    async def _change_breakers(self) -> None:
        """Write the changes of breakers, except those of locked configs."""
        postponed: dict[UUID, BreakerChange] = {}
        while self._changes:
            # More changes arrive while these are written.
            changes, self._changes = self._changes, {}
            try:
                held = await self._write_breakers(changes)
            except (*RETRYABLE_ERRORS, asyncpg.PostgresError) as error:
                locked = isinstance(error, asyncpg.LockNotAvailableError)
                if _is_database_failure(error) or (locked and not self._webhooks_are_locked):
                    log.warning("breakers_retried", error=repr(error))
                    for later in self._changes.values():
                        _merge(changes, later)
                    self._changes = changes
                    self._webhooks_are_locked |= locked
                    if not locked:
                        await asyncio.sleep(_RETRY_SECONDS)
                    continue
                # The next attempts lead to the same change.
                log.warning("breakers_not_changed", error=repr(error))
            else:
                for webhook_id in held:
                    _merge(postponed, changes[webhook_id])
        self._changes = postponed

    async def _write_breakers(self, changes: Mapping[UUID, BreakerChange]) -> Collection[UUID]:
        """Return the configs that are locked, which are searched for only after a lock timeout."""
        if not self._webhooks_are_locked:
            await self._apply(self._pool, changes.values())
            return ()
        async with self._pool.acquire() as connection, connection.transaction():
            held = await queue.held_webhooks(connection, changes)
            await self._apply(
                connection, [c for webhook_id, c in changes.items() if webhook_id not in held]
            )
        self._webhooks_are_locked = bool(held)
        return held

    async def _apply(self, connection: Executor, changes: Collection[BreakerChange]) -> None:
        opening = [c for c in changes if c.trips or c.requested_pause_seconds]
        await self._open_breakers(connection, opening)
        await self._close_breakers(
            connection,
            [c.webhook_id for c in changes if not (c.trips or c.requested_pause_seconds)],
        )

    async def _open_breakers(self, connection: Executor, changes: Sequence[BreakerChange]) -> None:
        if not changes:
            return
        opened = await queue.open_breakers(
            connection,
            changes,
            self._settings.breaker_cooldown_seconds,
            self._settings.breaker_cooldown_max_seconds,
        )
        self._metrics.breakers_opened.inc(len(opened))
        for change in changes:
            if change.webhook_id in opened:
                log.warning(
                    "breaker_opened",
                    webhook_id=format_id("wh", change.webhook_id),
                    failures=change.failures,
                    seconds=opened[change.webhook_id],
                    asked=change.requested_pause_seconds > 0,
                )

    async def _close_breakers(self, connection: Executor, webhook_ids: Sequence[UUID]) -> None:
        if webhook_ids:
            closed = await queue.close_breakers(connection, webhook_ids)
            self._metrics.breakers_closed.inc(len(closed))
            for webhook_id in closed:
                log.info("breaker_closed", webhook_id=format_id("wh", webhook_id))

    def _set_aside(
        self, settlement: Settlement, error: BaseException
    ) -> list[tuple[Sequence[Settlement], SettleResult]]:
        delivery_id = format_id("dlv", settlement.delivery_id)
        if isinstance(error, asyncpg.LockNotAvailableError):
            log.warning("settle_postponed", deliveries=1)
            self._pending.append(settlement)
            return []
        log.error("settle_refused", delivery_id=delivery_id, error=repr(error))
        return [([settlement], SettleResult(frozenset(), {}))]


def _merge(changes: dict[UUID, BreakerChange], change: BreakerChange) -> None:
    """Keep one change per config: the one with the longest pause."""
    before = changes.get(change.webhook_id, change)
    if (change.version or 0) != (before.version or 0):
        # A change for an older version is ignored.
        changes[change.webhook_id] = max(before, change, key=lambda c: c.version or 0)
        return
    longer = before if before.trips and not change.trips else change
    changes[change.webhook_id] = replace(
        longer,
        requested_pause_seconds=max(before.requested_pause_seconds, change.requested_pause_seconds),
    )


def _is_database_failure(error: BaseException) -> bool:
    """Return whether the database failed rather than one row of the batch."""
    return isinstance(error, RETRYABLE_ERRORS) and not isinstance(
        error, asyncpg.LockNotAvailableError
    )
