"""How the database stands, for whoever asks this engine: read when asked, and not more often than
every few seconds, however many ask.

It never keeps anyone waiting for long: of a database that is away or slow it says just that.
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

#: What is so old is told again.
FRESH_SECONDS = 5.0
#: Nobody waits longer; a reading that does goes on for the next who asks.
PATIENCE_SECONDS = 2.0
#: Configs that are counted one by one; of more, those that live are estimated.
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
    """What one look found; what could not be read is None."""

    database_up: bool
    #: Our clock minus the database's.
    clock_skew_seconds: float | None = None
    depth: QueueStats | None = None
    #: Webhook configs by status: active, or why not.
    configs: Mapping[str, int] | None = None
    partition_days_ahead: int | None = None
    retention_completed_at: datetime | None = None


class DatabaseStats:
    """Reads on a connection of the engine's pool."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = monotonic):
        self._pool = pool
        self._clock = clock
        self._latest = Reading(database_up=False)
        self._read_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    async def reading(self) -> Reading:
        """Not older than a few seconds; as far as it has come, when it takes longer than that."""
        if self._clock() - self._read_at >= FRESH_SECONDS:
            if self._looking is None or self._looking.done():
                self._latest = Reading(database_up=False)
                self._looking = asyncio.create_task(self._look())
            await asyncio.wait({self._looking}, timeout=PATIENCE_SECONDS)
        return self._latest

    async def close(self) -> None:
        """Give up a look under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def _look(self) -> None:
        try:
            async with self._pool.acquire() as connection:
                await self._ask(connection)
        except (*CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            log.warning("census_failed", error=repr(error))
            self._latest = Reading(database_up=False)
        self._read_at = self._clock()

    async def _ask(self, connection: Any) -> None:
        began = time()
        row = await connection.fetchrow(_CLOCK)
        skew = (began + time()) / 2 - row["now"].timestamp()
        # A standby takes no results: as in the server's health, it is none of ours.
        self._latest = Reading(not row["is_standby"], skew)
        if row["is_standby"]:
            return
        self._latest = replace(
            self._latest,
            depth=await _unless_refused(read_queue_stats(connection)),
            configs=await _unless_refused(_configs(connection)),
            partition_days_ahead=await _unless_refused(days_ahead(connection)),
            retention_completed_at=await _unless_refused(last_completed(connection)),
        )


async def _configs(connection: Any) -> Mapping[str, int]:
    return dict(await connection.fetchrow(_CONFIGS, _COUNTED_MAX))


async def _unless_refused[T](answer: Awaitable[T]) -> T | None:
    """None for what takes the database too long, or waits for somebody's lock."""
    try:
        return await answer
    except (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError) as error:
        log.warning("census_incomplete", error=repr(error))
        return None
