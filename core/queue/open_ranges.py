"""What is still open of long ago: retention asks, before it removes anything."""

from collections.abc import Sequence
from uuid import UUID

from core.queue.types import Connection

_STANDING = """
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


async def standing(connection: Connection, low: UUID, high: UUID) -> tuple[int, int]:
    """How many deliveries with ids in [low, high) are open, and their attempts so far.

    Of a time that is over the first only falls and an attempt raises the second: as long as both
    stay, nothing of that time has been attempted or finished.
    """
    row = await connection.fetchrow(_STANDING, low, high)
    return row["deliveries"], row["attempts"]


async def open_between(connection: Connection, after: UUID, high: UUID, limit: int) -> list[UUID]:
    """The next open deliveries with ids in (after, high)."""
    return [row["id"] for row in await connection.fetch(_OPEN, after, high, limit)]


async def old_events_of_open(
    connection: Connection, after: UUID, before_event: UUID, limit: int
) -> tuple[UUID | None, Sequence[UUID]]:
    """Looks at the next open deliveries: where to go on, and which of their events are older.

    The queue has no index by event, so a whole look passes through all of it, a page a statement.
    """
    row = await connection.fetchrow(_EVENTS, after, before_event, limit)
    return row["last_id"], row["event_ids"]
