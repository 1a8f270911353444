"""Runs retention every hour: each engine process checks whether a run is due."""

import asyncio
from datetime import timedelta

import asyncpg
import structlog

from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.retention.run import last_completed, run_once
from core.settings import DatabaseSettings, RetentionSettings

#: Hourly, so that a failed step is retried on the same day.
_INTERVAL = timedelta(hours=1)
_CHECK_SECONDS = 60.0

log = structlog.get_logger()


async def run_hourly(database: DatabaseSettings, settings: RetentionSettings, pool: Pool) -> None:
    """Run when a run is due, until cancelled. An error never ends it."""
    while True:
        try:
            if await _is_due(pool):
                await run_once(database, settings)
        except RETRYABLE_ERRORS as error:
            log.warning("retention_retried", error=repr(error))
        except asyncpg.exceptions.InsufficientPrivilegeError as error:
            # Only the owner of the tables may drop them; see docs/operate/retention.md.
            log.error("retention_not_allowed", error=str(error))
        except Exception:
            log.exception("retention_broke")
        await asyncio.sleep(_CHECK_SECONDS)


async def _is_due(pool: Pool) -> bool:
    completed = await last_completed(pool)
    now = await pool.fetchval("SELECT now()")
    return completed is None or now - completed >= _INTERVAL
