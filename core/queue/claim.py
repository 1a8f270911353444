"""Leases: taken by a claim, given up by an engine that stops, taken back when they have ended."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from uuid import UUID

from core.ids import new_id
from core.postgres.planner import equal
from core.queue.types import Connection, LeasedDelivery

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
    -- Not EXISTS, for which the planner may think of reading all backlogs.
    (
        SELECT true FROM delivery_queue p
        WHERE p.webhook_id = l.webhook_id AND p.state = 'parked' LIMIT 1
    ) IS NOT NULL AS has_backlog,
    l.event_id, l.merchant_id, l.event_type, e.content_type, e.payload, l.attempt_count,
    l.fault_count,
    -- Nothing that Python cannot read, and not the future: clocks are set back.
    least(greatest(l.created_at, e.not_before, 'epoch'), now()) AS owed_since,
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


# By the few that are leased: only after a claim that was not answered is anything asked so.
_RELEASE_CLAIMED = f"""
WITH claimed AS (
    SELECT id FROM delivery_queue WHERE state = 'leased' AND lease_id = ANY ($1)
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q SET state = 'ready', lease_id = NULL, lease_until = NULL
FROM claimed WHERE {equal("q.id", "claimed.id")}
"""  # noqa: S608 - of constants


# The first reclaim is due at once; a delivery whose engines keep dying comes back ever slower.
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
    connection: Connection, limit: int, lease_seconds: float, lease_id: UUID | None = None
) -> list[LeasedDelivery]:
    """Take up to `limit` due deliveries under one lease, the longest due first.

    Who gives the lease's id, a new one, can give back what was taken when no answer comes.
    """
    lease_id = lease_id or new_id()
    rows = await connection.fetch(_CLAIM, limit, lease_id, timedelta(seconds=lease_seconds))
    return [LeasedDelivery(lease_id, *row) for row in rows]


async def release(connection: Connection, deliveries: Sequence[LeasedDelivery]) -> None:
    """Give up leases at once, for another engine; it counts neither as attempt nor as reclaim."""
    await connection.execute(_RELEASE, *fences(deliveries))


async def release_claimed(connection: Connection, lease_ids: Collection[UUID]) -> int:
    """Give up all that is under these leases; returns how many deliveries that were."""
    tag: str = await connection.execute(_RELEASE_CLAIMED, list(lease_ids))
    return int(tag.rpartition(" ")[2])


async def reclaim(connection: Connection, limit: int) -> list[UUID]:
    """Return up to `limit` deliveries whose lease has ended to the queue."""
    return [row["id"] for row in await connection.fetch(_RECLAIM, limit)]


async def reclaimed_often(
    connection: Connection, delivery_ids: Sequence[UUID], times: int
) -> list[tuple[UUID, UUID, int]]:
    """Of these, the deliveries reclaimed so many times in all: id, webhook id, how many."""
    rows = await connection.fetch(_RECLAIMED_OFTEN, delivery_ids, times)
    return [(row["id"], row["webhook_id"], row["reclaim_count"]) for row in rows]


def fences(deliveries: Sequence[LeasedDelivery]) -> tuple[list[UUID], list[UUID]]:
    return [d.id for d in deliveries], [d.lease_id for d in deliveries]
