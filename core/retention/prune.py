"""Removes row by row what is in no day: what outlived its day, or never had one.

A thousand rows a statement and a transaction each. Each function can be broken off anywhere and
begun again; with `dry` it only counts.
"""

from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from core import queue
from core.ids import first_id_at
from core.postgres.connect import Connection
from core.postgres.planner import equal, hidden
from core.retention.partitions import GAVE_WAY, KEYS, Day, patiently
from core.retention.policy import DeliveryTerms

_PAGE = 1000
_QUEUE_PAGE = 20_000
_FIRST = UUID(int=0)
#: Audit ids begin with a server's time and `created_at` is the database's.
_CLOCKS_APART = timedelta(days=1)
_RUNS_KEPT = timedelta(days=90)

_PARTS = """
SELECT c.relname FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
WHERE c.relname = ANY ($1) AND i.inhparent = ANY ($2::regclass[]) ORDER BY 1
"""

_FINISHED = """
WITH page AS MATERIALIZED (
    SELECT id, state, finished_at FROM {part} WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3
), over AS MATERIALIZED (
    SELECT id FROM page
    WHERE finished_at < CASE state WHEN 'delivered' THEN $4::timestamptz ELSE $5 END
){removed}
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM over) AS over
"""
_FINISHED_REMOVED = f""", deliveries AS (
    DELETE FROM {{part}} f USING over o WHERE {equal("f.id", "o.id")} RETURNING f.id
), attempts AS (
    DELETE FROM attempts a USING deliveries d WHERE {equal("a.delivery_id", "d.id")}
)"""  # noqa: S608 - of constants

_EVENTS = """
WITH page AS MATERIALIZED (
    SELECT id, created_at FROM {part} WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3
), needed AS MATERIALIZED (
    SELECT event_id FROM finished_deliveries
    WHERE event_id > $1 AND event_id <= (SELECT id FROM page ORDER BY id DESC LIMIT 1)
    UNION
    SELECT event_id FROM open_events
    WHERE event_id > $1 AND event_id <= (SELECT id FROM page ORDER BY id DESC LIMIT 1)
), over AS MATERIALIZED (
    SELECT id FROM page p
    WHERE created_at < $4 AND NOT EXISTS (SELECT FROM needed n WHERE n.event_id = p.id)
){removed}
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM over) AS over
"""
_EVENTS_REMOVED = f"""
, events AS (DELETE FROM {{part}} e USING over o WHERE {equal("e.id", "o.id")})
"""  # noqa: S608 - of constants

# No time to find keys by: what is over may be nearly all there are.
_KEYS = f"""
WITH over AS MATERIALIZED (
    SELECT merchant_id, key FROM idempotency_keys
    WHERE created_at < $1 ORDER BY created_at LIMIT $2
)
DELETE FROM idempotency_keys k USING over o
WHERE {equal("k.merchant_id", "o.merchant_id")} AND {equal("k.key", "o.key")}
    AND {hidden("k.created_at")} < $1
"""  # noqa: S608 - of constants

_AUDIT = f"""
WITH over AS MATERIALIZED (
    SELECT id FROM audit_entries WHERE id < $3 AND created_at < $1 ORDER BY id LIMIT $2
)
DELETE FROM audit_entries a USING over o WHERE {equal("a.id", "o.id")}
"""  # noqa: S608 - of constants

# What was once gone stays said, however the settings change.
_RUNS = """
DELETE FROM retention_runs WHERE began_at < $1 AND coalesce(removed_before, '-infinity') <= (
    SELECT coalesce(max(removed_before), '-infinity') FROM retention_runs WHERE began_at >= $1
)
"""

_OPEN_EVENTS = """
DROP TABLE IF EXISTS pg_temp.open_events;
CREATE TEMPORARY TABLE open_events (event_id UUID PRIMARY KEY)
"""
_OPEN_EVENT = "INSERT INTO open_events SELECT * FROM unnest($1::uuid[]) ON CONFLICT DO NOTHING"


async def remove_finished(
    connection: Connection, terms: DeliveryTerms, *, dry: bool = False
) -> int:
    """Finished deliveries whose time is over, with all their attempts."""
    removed = 0
    for part in await rowwise_parts(connection, "finished_deliveries"):
        change = "" if dry else _FINISHED_REMOVED.format(part=part)
        removed += await _walk(
            connection,
            _FINISHED.format(part=part, removed=change),
            # What ended before began before.
            first_id_at(terms.delivered_before),
            terms.delivered_before,
            terms.undelivered_before,
        )
    return removed


async def note_open_events(connection: Connection, terms: DeliveryTerms) -> None:
    """Note which events that are old enough to go have an open delivery: in this session's table.

    Later than this only a redelivery makes an event needed; its origin is then still kept.
    """
    await connection.execute(_OPEN_EVENTS)
    bound = first_id_at(terms.delivered_before)
    after: UUID | None = _FIRST
    while after is not None:
        after, events = await queue.old_events_of_open(connection, after, bound, _QUEUE_PAGE)
        if events:
            await connection.execute(_OPEN_EVENT, events)


async def remove_events(connection: Connection, terms: DeliveryTerms, *, dry: bool = False) -> int:
    """Events that are old enough and of which nothing is open, by open_events, or kept."""
    removed = 0
    for part in await rowwise_parts(connection, "events"):
        change = "" if dry else _EVENTS_REMOVED.format(part=part)
        removed += await _walk(
            connection,
            _EVENTS.format(part=part, removed=change),
            first_id_at(terms.delivered_before, _CLOCKS_APART),
            terms.delivered_before,
        )
    return removed


async def count_keys(connection: Connection, before: datetime) -> int:
    query = "SELECT count(*) FROM idempotency_keys WHERE created_at < $1"
    return int(await connection.fetchval(query, before))


async def count_audit_entries(connection: Connection, before: datetime) -> int:
    query = "SELECT count(*) FROM audit_entries WHERE id < $2 AND created_at < $1"
    return int(await connection.fetchval(query, before, first_id_at(before, _CLOCKS_APART)))


async def remove_keys(connection: Connection, before: datetime) -> int:
    return await _delete(connection, _KEYS, before)


async def remove_audit_entries(connection: Connection, before: datetime) -> int:
    return await _delete(connection, _AUDIT, before, first_id_at(before, _CLOCKS_APART))


async def remove_runs(connection: Connection, now: datetime) -> None:
    await connection.execute(_RUNS, now - _RUNS_KEPT)


async def rowwise_parts(connection: Connection, table: str) -> list[str]:
    """The parts of a table that are of no day; the one from before there were days may be gone."""
    names = [f"{table}_{part}" for part in ("before", "default", "kept")]
    rows = await connection.fetch(_PARTS, names, [table, f"{table}_by_day"])
    return [row["relname"] for row in rows]


async def drop_emptied(connection: Connection) -> list[str]:
    """Drop the parts from before there were days that have nothing left, each for itself."""
    dropped = []
    for table in KEYS:
        part = f"{table}_before"
        if part not in await rowwise_parts(connection, table):
            continue
        # Nothing new gets there.
        query = f"SELECT EXISTS (SELECT FROM {part})"  # noqa: S608 - of constants
        if not await connection.fetchval(query):
            with suppress(*GAVE_WAY):
                await patiently(connection.execute, f"DROP TABLE {part}")
                dropped.append(part)
    return dropped


async def _walk(connection: Connection, statement: str, bound: UUID, *arguments: object) -> int:
    over, after = 0, _FIRST
    while True:
        row = await patiently(connection.fetchrow, statement, after, bound, _PAGE, *arguments)
        if row["last_id"] is None:
            return over
        over += row["over"]
        after = row["last_id"]


async def _delete(connection: Connection, statement: str, *arguments: object) -> int:
    first, *others = arguments
    total = 0
    while True:
        tag: str = await patiently(connection.execute, statement, first, _PAGE, *others)
        deleted = int(tag.rpartition(" ")[2])
        total += deleted
        if deleted < _PAGE:
            return total


# Moves what outlives its day to the kept part, row by row, before the day is dropped.
#
# A row moves by an update of `kept`: whoever reads sees it once, here or there. Each function
# can be
# broken off anywhere and begun again; with `dry` it only counts.

_MOVE_PAGE = 5000
_DELIVERIES = 500
#: Their payloads move with them.
_EVENTS_PER_MOVE = 100

_FINISHED_TO_MOVE = """
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
    statement = _FINISHED_TO_MOVE.format(part=part, moved="" if dry else _FINISHED_MOVED)
    after: UUID | None = _before(day.low)
    while after is not None:
        row = await patiently(
            connection.fetchrow, statement, after, terms.delivered_before, _MOVE_PAGE
        )
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
    while rows := await connection.fetch(_NEEDED, after, day.high, _EVENTS_PER_MOVE):
        ids = [row["event_id"] for row in rows]
        kept += len(ids)
        if not dry:
            await patiently(connection.execute, _EVENTS_MOVED, ids)
        after = ids[-1]
    return kept


def _before(id_: UUID) -> UUID:
    return UUID(int=id_.int - 1)
