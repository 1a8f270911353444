"""Leases: a claim takes them, a stopping engine releases them, a reclaim ends expired ones."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from uuid import UUID

from core.ids import new_id
from core.postgres.planner import equal
from core.postgres.protocols import Executor
from core.queue.types import LeasedDelivery

_CLAIM = f"""
WITH due AS (
    SELECT id FROM delivery_queue
    WHERE state = 'ready' AND due_at <= now()
    ORDER BY due_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED
), leased AS (
    UPDATE delivery_queue q
    SET state = 'leased', lease_id = $2, lease_until = now() + $3
    FROM due WHERE {equal("q.id", "due.id")}
    RETURNING q.id, q.webhook_id, q.event_id, q.merchant_id, q.event_type, q.attempt_count,
        q.fault_count, q.created_at
)
SELECT l.id, l.webhook_id, c.version AS webhook_version, c.active AS webhook_active,
    c.deleted_at IS NOT NULL AS webhook_deleted, c.breaker_open_until,
    -- The planner could answer EXISTS by reading all backlogs.
    (
        SELECT true FROM delivery_queue p
        WHERE p.webhook_id = l.webhook_id AND p.state = 'parked' LIMIT 1
    ) IS NOT NULL AS has_backlog,
    l.event_id, l.merchant_id, l.event_type, e.content_type, e.payload, l.attempt_count,
    l.fault_count,
    -- Not before 1970, which Python cannot read, and not the future, because clocks are set back.
    least(greatest(l.created_at, e.not_before, 'epoch'), now()) AS due_since,
    now() AS claimed_at, e.trace_parent
FROM leased l
JOIN webhook_configs c ON {equal("c.id", "l.webhook_id")}
JOIN events e ON {equal("e.id", "l.event_id")}
"""  # noqa: S608 - of constants


_RELEASE = f"""
UPDATE delivery_queue q SET state = 'ready', lease_id = NULL, lease_until = NULL
FROM unnest($1::uuid[], $2::uuid[]) AS t(id, lease_id)
WHERE {equal("q.id", "t.id")} AND q.lease_id = t.lease_id
"""  # noqa: S608 - of constants


# Searches the leased rows, which are few. It runs only after a claim without a response.
_RELEASE_CLAIMED = f"""
WITH claimed AS (
    SELECT id FROM delivery_queue WHERE state = 'leased' AND lease_id = ANY ($1)
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q SET state = 'ready', lease_id = NULL, lease_until = NULL
FROM claimed WHERE {equal("q.id", "claimed.id")}
"""  # noqa: S608 - of constants


# The first reclaim is due at once. Each further one doubles the wait, because the delivery may be
# the cause of the crashes.
_RECLAIM = f"""
WITH expired AS (
    SELECT id FROM delivery_queue
    WHERE state = 'leased' AND lease_until < now()
    ORDER BY lease_until
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q
SET state = 'ready', lease_id = NULL, lease_until = NULL,
    reclaim_count = least(q.reclaim_count, 1000000) + 1,
    due_at = now() + (2 ^ least(q.reclaim_count, 9) - 1) * interval '1 second'
FROM expired WHERE {equal("q.id", "expired.id")}
RETURNING q.id
"""  # noqa: S608 - of constants

_RECLAIMED_OFTEN = """
SELECT id, webhook_id, reclaim_count FROM delivery_queue WHERE id = ANY ($1) AND reclaim_count >= $2
"""


async def claim(
    connection: Executor, limit: int, lease_seconds: float, lease_id: UUID | None = None
) -> list[LeasedDelivery]:
    """Lease up to `limit` due deliveries, the longest due first.

    Pass a new `lease_id` to be able to release the lease if the response is lost.
    """
    lease_id = lease_id or new_id()
    rows = await connection.fetch(_CLAIM, limit, lease_id, timedelta(seconds=lease_seconds))
    return [LeasedDelivery(lease_id=lease_id, **row) for row in rows]


async def release(connection: Executor, deliveries: Sequence[LeasedDelivery]) -> None:
    """End leases at once, for another engine. It counts neither as an attempt nor as a reclaim."""
    await connection.execute(_RELEASE, *fences(deliveries))


async def release_claimed(connection: Executor, lease_ids: Collection[UUID]) -> int:
    """Release all deliveries under these leases and return their number."""
    tag: str = await connection.execute(_RELEASE_CLAIMED, list(lease_ids))
    return int(tag.rpartition(" ")[2])


async def reclaim(connection: Executor, limit: int) -> list[UUID]:
    """Return up to `limit` deliveries with expired leases to the queue."""
    return [row["id"] for row in await connection.fetch(_RECLAIM, limit)]


async def reclaimed_often(
    connection: Executor, delivery_ids: Sequence[UUID], times: int
) -> list[tuple[UUID, UUID, int]]:
    """Return (id, webhook id, reclaims) of these deliveries that were reclaimed `times` or more."""
    rows = await connection.fetch(_RECLAIMED_OFTEN, delivery_ids, times)
    return [(row["id"], row["webhook_id"], row["reclaim_count"]) for row in rows]


def fences(deliveries: Sequence[LeasedDelivery]) -> tuple[list[UUID], list[UUID]]:
    """Return the ids and the lease ids that fence a statement."""
    return [d.id for d in deliveries], [d.lease_id for d in deliveries]
