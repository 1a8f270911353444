"""Stage: takes due deliveries under a lease, and turns away those that may not be sent now."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

import structlog

from core import queue
from core.histogram import Histogram
from core.ids import new_id
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.queue import LeasedDelivery

#: How often the deliveries of a claim without an answer are looked for: of what was sent to a
#: database that nobody reached for a while, the last may arrive a minute later.
_LOOKS = 60

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Claim:
    """What one claim brought: `taken` counts all of it, `deliveries` are those to attempt."""

    taken: int
    deliveries: Sequence[LeasedDelivery]


class UnansweredClaims:
    """Claims whose answer never came: a database that was frozen carries them out all the same."""

    def __init__(self) -> None:
        self._looks: dict[UUID, int] = {}

    def add(self, lease_id: UUID) -> None:
        """Nobody knows what was taken under this lease."""
        self._looks[lease_id] = _LOOKS

    async def give_back(self, pool: Pool) -> int:
        """Make ready again what they took so far; returns how many deliveries that were."""
        if not self._looks:
            return 0
        looked_for = list(self._looks)
        released = await queue.release_claimed(pool, looked_for)
        for lease_id in looked_for:
            self._looks[lease_id] -= 1
            if not self._looks[lease_id]:
                del self._looks[lease_id]
        return released


async def claim(
    pool: Pool, limit: int, lease_seconds: float, took: Histogram, unanswered: UnansweredClaims
) -> Claim:
    """Claim up to `limit` deliveries; put those that may not be sent now where they belong.

    Such rows are few: what a config has due is parked or cancelled in the statement that stopped
    it, and only retries, and events accepted at that very moment, can still become ready. `took`
    hears how long the statement that claims took, `unanswered` of one that failed.
    """
    asked_at = monotonic()
    lease_id = new_id()
    async with pool.acquire() as connection:
        try:
            leased = await queue.claim(connection, limit, lease_seconds, lease_id)
        except RETRYABLE_ERRORS:
            unanswered.add(lease_id)
            raise
    seconds = monotonic() - asked_at
    took.observe(seconds)
    if leased and seconds > lease_seconds / 2:
        # The answer of a database that was frozen: the leases began before it, and others may have
        # taken them back already. An attempt needs up to half a lease.
        log.warning("claim_came_late", deliveries=len(leased))
        await queue.release(pool, leased)
        return Claim(len(leased), ())
    for webhook_id in {d.webhook_id for d in leased if d.webhook_deleted}:
        await queue.cancel_some(pool, webhook_id)
    present = [d for d in leased if not d.webhook_deleted]
    waiting = [d for d in present if not d.webhook_active or d.breaker_is_open]
    if waiting:
        await queue.park_leased(pool, waiting)
    return Claim(len(leased), [d for d in present if d.webhook_active and not d.breaker_is_open])
