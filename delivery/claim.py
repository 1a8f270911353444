"""Stage: takes due deliveries under a lease, and turns away those that may not be sent now."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import structlog

from core import queue
from core.db import Pool
from core.measures import Histogram
from core.queue import LeasedDelivery

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Claim:
    """What one claim brought: `taken` counts all of it, `deliveries` are those to attempt."""

    taken: int
    deliveries: Sequence[LeasedDelivery]


async def claim(pool: Pool, limit: int, lease_seconds: float, took: Histogram) -> Claim:
    """Claim up to `limit` deliveries; put those that may not be sent now where they belong.

    Such rows are few: what a config has due is parked or cancelled in the statement that stopped
    it, and only retries, and events accepted at that very moment, can still become ready. `took`
    hears how long the statement that claims took.
    """
    asked_at = monotonic()
    leased = await queue.claim(pool, limit, lease_seconds)
    seconds = monotonic() - asked_at
    took.observe(seconds)
    if leased and seconds > lease_seconds / 2:
        # The answer of a database that was frozen: the leases began before it, and others may have
        # taken them back already. An attempt needs up to half a lease.
        log.warning("claim_came_late", deliveries=len(leased))
        await queue.release(pool, leased)
        return Claim(len(leased), ())
    for webhook_id in {d.webhook_id for d in leased if d.webhook_deleted}:
        await queue.cancel_webhook(pool, webhook_id)
    present = [d for d in leased if not d.webhook_deleted]
    waiting = [d for d in present if not d.webhook_active or d.is_held]
    if waiting:
        await queue.park_leased(pool, waiting)
    return Claim(len(leased), [d for d in present if d.webhook_active and not d.is_held])
