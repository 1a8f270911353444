"""Open deliveries within ranges of ids. Retention reads them before it removes anything."""

from collections.abc import Sequence
from uuid import UUID

from core.postgres.protocols import Executor

_COUNT_OPEN = """
SELECT count(*) AS deliveries, coalesce(sum(attempt_count), 0) AS attempts
FROM delivery_queue WHERE id >= $1 AND id < $2
"""

_OPEN = "SELECT id FROM delivery_queue WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3"

_EVENTS = """
WITH page AS MATERIALIZED (
    SELECT id, event_id FROM delivery_queue WHERE id > $1 ORDER BY id LIMIT $3
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    ARRAY(SELECT DISTINCT event_id FROM page WHERE event_id < $2) AS event_ids
"""


async def count_open(connection: Executor, low: UUID, high: UUID) -> tuple[int, int]:
    """Return the number of open deliveries with ids in [low, high), and of their attempts.

    In a range that has passed, the first number only falls and an attempt raises the second. As
    long as both are the same, no delivery of the range was attempted or finished.
    """
    row = await connection.fetchrow(_COUNT_OPEN, low, high)
    return row["deliveries"], row["attempts"]


async def open_between(connection: Executor, after: UUID, high: UUID, limit: int) -> list[UUID]:
    """Return the next open deliveries with ids in (after, high)."""
    return [row["id"] for row in await connection.fetch(_OPEN, after, high, limit)]


async def old_events_of_open(
    connection: Executor, after: UUID, before_event: UUID, limit: int
) -> tuple[UUID | None, Sequence[UUID]]:
    """Read the next open deliveries: return the last id, and their events before `before_event`.

    The queue has no index by event, so a full scan reads all of it, one page per statement.
    """
    row = await connection.fetchrow(_EVENTS, after, before_event, limit)
    return row["last_id"], row["event_ids"]
