"""Moves what outlives its day to the kept part, row by row, before the day is dropped.

A row moves by an update of `kept`: whoever reads sees it once, here or there. Each function can be
broken off anywhere and begun again; with `dry` it only counts.
"""

from uuid import UUID

from core import queue
from core.connection import Connection
from core.lookup import equal
from core.retention.days import Day
from core.retention.patience import patiently
from core.retention.terms import DeliveryTerms

_PAGE = 5000
_DELIVERIES = 500
#: Their payloads move with them.
_EVENTS = 100

_FINISHED = """
WITH page AS MATERIALIZED (
    SELECT id, state, finished_at FROM {part} WHERE id > $1 ORDER BY id LIMIT $3
), outliving AS MATERIALIZED (
    SELECT id FROM page WHERE state <> 'delivered' OR finished_at >= $2
){moved}
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM outliving) AS outliving
"""
_FINISHED_MOVED = f""", moved AS (
    UPDATE finished_deliveries f SET kept = true FROM outliving o
    WHERE {equal("f.id", "o.id")} AND f.kept = false
)"""  # noqa: S608 - of constants

_REMAINING = """
SELECT id FROM finished_deliveries
WHERE (kept OR kept IS NULL) AND id > $1 AND id < $2 ORDER BY id LIMIT $3
"""

_ATTEMPTS = """
UPDATE attempts SET kept = true WHERE kept = false AND delivery_id = ANY ($1)
"""

# By the index of finished deliveries by event, in every part of them.
_NEEDED = """
(
    SELECT event_id FROM open_events WHERE event_id > $1 AND event_id < $2
    ORDER BY event_id LIMIT $3
) UNION (
    SELECT event_id FROM finished_deliveries WHERE event_id > $1 AND event_id < $2
    ORDER BY event_id LIMIT $3
) ORDER BY event_id LIMIT $3
"""

_EVENTS_MOVED = "UPDATE events SET kept = true WHERE kept = false AND id = ANY ($1)"


async def keep_history(
    connection: Connection, day: Day, terms: DeliveryTerms, *, dry: bool = False
) -> int:
    """Deliveries that did not go well, or ended late, and all attempts of what remains."""
    kept = 0
    part = day.part("finished_deliveries")
    statement = _FINISHED.format(part=part, moved="" if dry else _FINISHED_MOVED)
    after: UUID | None = _before(day.low)
    while after is not None:
        row = await patiently(connection.fetchrow, statement, after, terms.delivered_before, _PAGE)
        after = row["last_id"]
        kept += row["outliving"]
    if not dry:
        await _keep_attempts(connection, day)
    return kept


async def _keep_attempts(connection: Connection, day: Day) -> None:
    after = _before(day.low)
    while ids := await queue.open_between(connection, after, day.high, _DELIVERIES):
        await patiently(connection.execute, _ATTEMPTS, ids)
        after = ids[-1]
    after = _before(day.low)
    while rows := await connection.fetch(_REMAINING, after, day.high, _DELIVERIES):
        await patiently(connection.execute, _ATTEMPTS, [row["id"] for row in rows])
        after = rows[-1]["id"]


async def keep_events(connection: Connection, day: Day, *, dry: bool = False) -> int:
    """Events of which a delivery is open, by open_events, or kept."""
    kept, after = 0, _before(day.low)
    while rows := await connection.fetch(_NEEDED, after, day.high, _EVENTS):
        ids = [row["event_id"] for row in rows]
        kept += len(ids)
        if not dry:
            await patiently(connection.execute, _EVENTS_MOVED, ids)
        after = ids[-1]
    return kept


def _before(id_: UUID) -> UUID:
    return UUID(int=id_.int - 1)
