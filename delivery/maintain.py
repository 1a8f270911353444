"""Stage: expired leases return to the queue, and chains that were left without a first go on.

Every engine runs this, a page at a time and without waiting for another's locks, so that nothing
depends on any one of them being alive.
"""

import asyncio

import structlog

from core import queue
from core.ids import format_id
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.queue import Chain

_PAGE = 500
#: Once or twice is an engine's own trouble; what is sent thrice without a result may be its cause.
_SUSPICIOUS = 3

log = structlog.get_logger()


async def reclaim(pool: Pool) -> int:
    """Return every delivery whose lease has ended; returns how many. Names those that often do."""
    total = 0
    while reclaimed := await queue.reclaim(pool, _PAGE):
        total += len(reclaimed)
        for delivery_id, webhook_id, times in await queue.reclaimed_often(
            pool, reclaimed, _SUSPICIOUS
        ):
            log.warning(
                "delivery_ends_engines",
                delivery_id=format_id("dlv", delivery_id),
                webhook_id=format_id("wh", webhook_id),
                times=times,
            )
    return total


async def promote_stranded(pool: Pool, after: Chain | None) -> tuple[int, Chain | None]:
    """Let the next delivery of each chain go that has no first; how many, and where to go on.

    Looks at a page of the chains, so what a sweep costs does not grow with them: they are found
    stranded only where a process died, or the database went away, between two statements.
    """
    chains = await queue.chains_after(pool, after, _PAGE)
    promoted = await queue.promote(pool, chains) if chains else 0
    return promoted, chains[-1] if len(chains) == _PAGE else None


# Stage: dead rows of the queue are cleared away, by whichever engine looks first.
#
# What a claim costs depends on it: at 3,000 deliveries a second, what PostgreSQL spent on each rose
# from 120 to 300 us within half a minute, and stays at 80 with a vacuum of 7 ms every two seconds.

_LOOK_SECONDS = 1.0
#: After one that failed, such as by taking longer than a statement may.
_RETRY_SECONDS = 10.0


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
