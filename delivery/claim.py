"""Stage: leases due deliveries, and parks or cancels those that may not be sent now."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

import structlog

from core import queue
from core.ids import new_id
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.queue import LeasedDelivery
from delivery.metrics import EngineMetrics

#: Sweeps, one per second, that search for the deliveries of a claim without a response. A statement
#: sent to an unreachable database can arrive a minute later.
_SWEEPS = 60

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Claim:
    """The result of one claim: the number of leased deliveries, and those to attempt."""

    taken: int
    deliveries: Sequence[LeasedDelivery]


class UnansweredClaims:
    """Claims whose response never came. A frozen database executes them after it thaws."""

    def __init__(self) -> None:
        self._sweeps_left: dict[UUID, int] = {}

    def add(self, lease_id: UUID) -> None:
        """Remember a claim that failed, so that it may or may not have been executed."""
        self._sweeps_left[lease_id] = _SWEEPS

    async def release(self, pool: Pool) -> int:
        """Release the deliveries that these claims leased so far, and return their number."""
        if not self._sweeps_left:
            return 0
        lease_ids = list(self._sweeps_left)
        released = await queue.release_claimed(pool, lease_ids)
        for lease_id in lease_ids:
            self._sweeps_left[lease_id] -= 1
            if not self._sweeps_left[lease_id]:
                del self._sweeps_left[lease_id]
        return released


async def claim(
    pool: Pool,
    limit: int,
    lease_seconds: float,
    metrics: EngineMetrics,
    unanswered: UnansweredClaims,
) -> Claim:
    """Claim up to `limit` deliveries, and park or cancel those that may not be sent now.

    Those are few: the statement that stops a config parks or cancels its due deliveries, so that
    only retries and concurrent events become ready. `unanswered` remembers a claim that failed.
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
    metrics.claim.observe(seconds)
    if leased and seconds > lease_seconds / 2:
        # The database was frozen. An attempt needs up to half of the lease, and another engine may
        # already have reclaimed the deliveries.
        log.warning("claim_came_late", deliveries=len(leased))
        await queue.release(pool, leased)
        return Claim(len(leased), ())
    for webhook_id in {d.webhook_id for d in leased if d.webhook_deleted}:
        await queue.cancel_some(pool, webhook_id)
    current = [d for d in leased if not d.webhook_deleted]
    waiting = [d for d in current if not d.webhook_active or d.breaker_is_open]
    if waiting:
        await queue.park_leased(pool, waiting)
    return Claim(len(leased), [d for d in current if d.webhook_active and not d.breaker_is_open])
