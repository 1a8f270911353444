"""When retention runs: each engine process asks now and then, and one at a time does it."""

import asyncio
from datetime import timedelta

import asyncpg
import structlog

from core.config import DatabaseSettings, RetentionSettings
from core.db import RETRYABLE_ERRORS, Pool
from core.retention.once import last_completed, run

#: Often enough that what a run could not do is tried again on the same day.
EVERY = timedelta(hours=1)
_ASK_SECONDS = 60.0

log = structlog.get_logger()


async def retain(database: DatabaseSettings, settings: RetentionSettings, pool: Pool) -> None:
    """Run when a run is due, until cancelled. Deliveries go on whatever comes of it."""
    while True:
        try:
            if await _is_due(pool):
                await run(database, settings)
        except RETRYABLE_ERRORS as error:
            log.warning("retention_retried", error=repr(error))
        except asyncpg.exceptions.InsufficientPrivilegeError as error:
            # Whoever migrated owns the tables; see docs/retention.md.
            log.error("retention_not_allowed", error=str(error))
        except Exception:
            log.exception("retention_broke")
        await asyncio.sleep(_ASK_SECONDS)


async def _is_due(pool: Pool) -> bool:
    completed = await last_completed(pool)
    now = await pool.fetchval("SELECT now()")
    return completed is None or now - completed >= EVERY
