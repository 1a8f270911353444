"""Stage: dead rows of the queue are cleared away, by whichever engine looks first.

What a claim costs depends on it: at 3,000 deliveries a second, what PostgreSQL spent on each rose
from 120 to 300 us within half a minute, and stays at 80 with a vacuum of 7 ms every two seconds.
"""

import asyncio

import structlog

from core import queue
from core.db import RETRYABLE_ERRORS, Pool

_LOOK_SECONDS = 1.0
#: After one that failed, such as by taking longer than a statement may.
_RETRY_SECONDS = 10.0

log = structlog.get_logger()


async def keep_clean(pool: Pool) -> None:
    """Vacuum the queue whenever it is time, until cancelled; where it cannot, autovacuum does."""
    while True:
        wait = _LOOK_SECONDS
        try:
            if await queue.has_many_dead(pool):
                await queue.vacuum(pool)
        except RETRYABLE_ERRORS as error:
            log.warning("vacuum_retried", error=repr(error))
            wait = _RETRY_SECONDS
        await asyncio.sleep(wait)
