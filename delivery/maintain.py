"""Stage: reclaims expired leases, promotes stranded chains and vacuums the queue.

Every engine runs this in pages and skips rows that others have locked, so that no work depends on
one engine.
"""

import asyncio

import structlog

from core import queue
from core.ids import format_id
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.queue import Chain

_PAGE = 500
#: A delivery with this many reclaims may itself be the reason why engines die.
_SUSPICIOUS = 3

log = structlog.get_logger()


async def reclaim(pool: Pool) -> int:
    """Reclaim all expired leases and return their number. Logs deliveries with many reclaims."""
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
    """Promote chains without a first delivery; return their number and the last chain read.

    It reads one page of chains per call, so that its cost is bounded. A chain is stranded only if a
    process or the database stopped between two statements.
    """
    chains = await queue.chains_after(pool, after, _PAGE)
    promoted = await queue.promote(pool, chains) if chains else 0
    return promoted, chains[-1] if len(chains) == _PAGE else None


_VACUUM_CHECK_SECONDS = 1.0
#: The wait after a failed vacuum, for example one that exceeded the statement timeout.
_VACUUM_RETRY_SECONDS = 10.0


async def keep_clean(pool: Pool) -> None:
    """Vacuum the queue when it has many dead rows, until cancelled.

    Dead rows slow claims down. At 3,000 deliveries per second, PostgreSQL's time per delivery rose
    from 120 to 300 us within half a minute. With a vacuum of 7 ms every two seconds it stays at 80.
    """
    while True:
        wait = _VACUUM_CHECK_SECONDS
        try:
            if await queue.has_many_dead(pool):
                await queue.vacuum(pool)
        except RETRYABLE_ERRORS as error:
            log.warning("vacuum_retried", error=repr(error))
            wait = _VACUUM_RETRY_SECONDS
        await asyncio.sleep(wait)
