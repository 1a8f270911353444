"""State of the database for the metrics of an engine, read on request every 5 s at most.

A slow or unavailable database does not delay a scrape: the stats then show that it is down.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic, time
from typing import Any

import asyncpg
import structlog

from core.postgres.pool import CONNECTION_ERRORS
from core.postgres.protocols import Pool
from core.queue import QueueStats, read_queue_stats
from core.retention import days_ahead, last_completed

#: Stats of this age are read again.
FRESH_SECONDS = 5.0
#: A scrape waits no longer. A read that takes longer continues for the next scrape.
WAIT_SECONDS = 2.0
#: Configs that are counted. Above this number the active ones are estimated.
_COUNTED_MAX = 10_000

_CLOCK = "SELECT clock_timestamp() AS now, pg_is_in_recovery() AS is_standby"

_CONFIGS = """
WITH inactive AS (
    SELECT deactivation_reason FROM webhook_configs
    WHERE NOT active AND deleted_at IS NULL ORDER BY id LIMIT $1
), live AS (
    SELECT count(*) AS counted FROM (
        SELECT FROM webhook_configs WHERE deleted_at IS NULL ORDER BY merchant_id, id LIMIT $1
    ) counted
), estimated AS (
    SELECT CASE WHEN l.counted < $1 THEN l.counted ELSE greatest(
        l.counted,
        c.reltuples * pg_relation_size(c.oid) / nullif(c.relpages, 0)
            / current_setting('block_size')::float8
    ) END::bigint AS live
    FROM live l CROSS JOIN pg_class c WHERE c.oid = 'webhook_configs_of_merchant'::regclass
)
SELECT e.live - (SELECT count(*) FROM inactive) AS active,
    (SELECT count(*) FROM inactive WHERE deactivation_reason = 'paused') AS paused,
    (SELECT count(*) FROM inactive WHERE deactivation_reason = 'failures') AS failures,
    (SELECT count(*) FROM inactive WHERE deactivation_reason = 'admin') AS admin,
    (SELECT count(*) FROM inactive WHERE deactivation_reason = 'gone') AS gone
FROM estimated e
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reading:
    """One snapshot. A value that could not be read is None."""

    database_up: bool
    #: The clock of this process minus the database's.
    clock_skew_seconds: float | None = None
    queue: QueueStats | None = None
    #: Webhook configs by status: active, or why not.
    configs: Mapping[str, int] | None = None
    partition_days_ahead: int | None = None
    retention_completed_at: datetime | None = None


class DatabaseStats:
    """Reads the state on a connection of the engine's pool."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = monotonic):
        self._pool = pool
        self._clock = clock
        self._latest = Reading(database_up=False)
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def reading(self) -> Reading:
        """Return stats that are at most 5 s old, or the part that was read within 2 s."""
        if self._clock() - self._read_at >= FRESH_SECONDS:
            if self._reading is None or self._reading.done():
                self._latest = Reading(database_up=False)
                self._reading = asyncio.create_task(self._read())
            await asyncio.wait({self._reading}, timeout=WAIT_SECONDS)
        return self._latest

    async def close(self) -> None:
        """Cancel a read under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            async with self._pool.acquire() as connection:
                await self._read_all(connection)
        except (*CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            log.warning("census_failed", error=repr(error))
            self._latest = Reading(database_up=False)
        self._read_at = self._clock()

    async def _read_all(self, connection: Any) -> None:
        began = time()
        row = await connection.fetchrow(_CLOCK)
        skew = (began + time()) / 2 - row["now"].timestamp()
        # A standby takes no writes, so its stats are not read.
        self._latest = Reading(not row["is_standby"], skew)
        if row["is_standby"]:
            return
        self._latest = replace(
            self._latest,
            queue=await _or_none(read_queue_stats(connection)),
            configs=await _or_none(_configs(connection)),
            partition_days_ahead=await _or_none(days_ahead(connection)),
            retention_completed_at=await _or_none(last_completed(connection)),
        )


async def _configs(connection: Any) -> Mapping[str, int]:
    return dict(await connection.fetchrow(_CONFIGS, _COUNTED_MAX))


async def _or_none[T](answer: Awaitable[T]) -> T | None:
    """Return None if the query is cancelled or waits too long for a lock."""
    try:
        return await answer
    except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError) as error:
        log.warning("census_incomplete", error=repr(error))
        return None
