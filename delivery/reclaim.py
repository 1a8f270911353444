"""Stage: expired leases return to the queue, and backlogs are let in as their configs have room.

Every engine runs this; a page at a time and without waiting for another's locks, so that nothing
depends on any one of them being alive.
"""

from uuid import UUID

from core import queue
from core.db import Pool

_PAGE = 500


async def reclaim(pool: Pool) -> int:
    """Return every delivery whose lease has ended; returns how many."""
    total = 0
    while reclaimed := len(await queue.reclaim(pool, _PAGE)):
        total += reclaimed
    return total


async def admit_backlogs(pool: Pool, places: int) -> set[UUID]:
    """Let parked deliveries of active configs in as far as they have room; returns the configs."""
    webhook_ids = await queue.webhooks_with_backlog(pool)
    return await queue.admit(pool, webhook_ids, places) if webhook_ids else set()
