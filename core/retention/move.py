"""Moves rows that outlive their day to the `kept` partition, before the day is dropped.

An update of the column `kept` moves a row, so a reader sees it exactly once. Each function can be
interrupted and repeated.
"""

from uuid import UUID

from core import queue
from core.postgres.planner import equal
from core.postgres.protocols import Connection
from core.retention.partitions import Day, retry_lock_conflicts, walk_pages
from core.retention.policy import RetentionPolicy

_PAGE_ROWS = 5000
_DELIVERIES_PER_MOVE = 500
#: Fewer, because payloads move with the events.
_EVENTS_PER_MOVE = 100

_FINISHED = """
WITH page AS MATERIALIZED (
    SELECT id, state, finished_at FROM {partition} WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3
), matched AS MATERIALIZED (
    SELECT id FROM page WHERE state <> 'delivered' OR finished_at >= $4
){change}
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM matched) AS matched
"""
_MOVE_FINISHED = f""", moved AS (
    UPDATE finished_deliveries f SET kept = true FROM matched m
    WHERE {equal("f.id", "m.id")} AND f.kept = false
)"""  # noqa: S608 - constants

_REMAINING = """
SELECT id FROM finished_deliveries
WHERE (kept OR kept IS NULL) AND id > $1 AND id < $2 ORDER BY id LIMIT $3
"""

_MOVE_ATTEMPTS = """
UPDATE attempts SET kept = true WHERE kept = false AND delivery_id = ANY ($1)
"""

# Reads the index of finished deliveries by event in every partition.
_NEEDED_EVENTS = """
(
    SELECT event_id FROM open_events WHERE event_id > $1 AND event_id < $2
    ORDER BY event_id LIMIT $3
) UNION (
    SELECT event_id FROM finished_deliveries WHERE event_id > $1 AND event_id < $2
    ORDER BY event_id LIMIT $3
) ORDER BY event_id LIMIT $3
"""

_MOVE_EVENTS = "UPDATE events SET kept = true WHERE kept = false AND id = ANY ($1)"


async def move_history(
    connection: Connection, day: Day, policy: RetentionPolicy, *, dry_run: bool = False
) -> int:
    """Move deliveries that failed, were cancelled or ended late, and the attempts of all that stay.

    Returns the number of deliveries. A dry run only counts them.
    """
    moved = await walk_pages(
        connection,
        _FINISHED.format(
            partition=day.partition("finished_deliveries"),
            change="" if dry_run else _MOVE_FINISHED,
        ),
        _before(day.low),
        day.high,
        _PAGE_ROWS,
        policy.delivered_before,
    )
    if not dry_run:
        await _move_attempts(connection, day)
    return moved


async def _move_attempts(connection: Connection, day: Day) -> None:
    after = _before(day.low)
    while ids := await queue.open_between(connection, after, day.high, _DELIVERIES_PER_MOVE):
        await retry_lock_conflicts(connection.execute, _MOVE_ATTEMPTS, ids)
        after = ids[-1]
    after = _before(day.low)
    while rows := await connection.fetch(_REMAINING, after, day.high, _DELIVERIES_PER_MOVE):
        ids = [row["id"] for row in rows]
        await retry_lock_conflicts(connection.execute, _MOVE_ATTEMPTS, ids)
        after = ids[-1]


async def move_events(connection: Connection, day: Day) -> int:
    """Move events with an open delivery (by the table `open_events`) or a kept delivery."""
    moved, after = 0, _before(day.low)
    while rows := await connection.fetch(_NEEDED_EVENTS, after, day.high, _EVENTS_PER_MOVE):
        ids = [row["event_id"] for row in rows]
        await retry_lock_conflicts(connection.execute, _MOVE_EVENTS, ids)
        moved += len(ids)
        after = ids[-1]
    return moved


def _before(id_: UUID) -> UUID:
    return UUID(int=id_.int - 1)
