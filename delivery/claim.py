"""Stage: takes due deliveries under a lease, and turns away those that may not be sent now."""

from collections.abc import Sequence
from dataclasses import dataclass

from core import queue
from core.db import Pool
from core.queue import LeasedDelivery


@dataclass(frozen=True, slots=True)
class Claim:
    """What one claim brought: `taken` counts all of it, `deliveries` are those to attempt."""

    taken: int
    deliveries: Sequence[LeasedDelivery]


async def claim(pool: Pool, limit: int, lease_seconds: float) -> Claim:
    """Claim up to `limit` deliveries; put those of inactive or deleted configs where they belong.

    Such rows are rare: a config's rows are parked or cancelled in the transaction that changed it,
    and only an event accepted at that very moment can still be ready.
    """
    leased = await queue.claim(pool, limit, lease_seconds)
    for webhook_id in {d.webhook_id for d in leased if d.webhook_deleted}:
        await queue.cancel_webhook(pool, webhook_id)
    inactive = [d for d in leased if not d.webhook_active and not d.webhook_deleted]
    if inactive:
        await queue.park_leased(pool, inactive)
    callable_now = [d for d in leased if d.webhook_active and not d.webhook_deleted]
    return Claim(len(leased), callable_now)
