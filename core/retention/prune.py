"""Removes old rows one by one: those that outlived their day or never had a daily partition.

One statement and one transaction per page of 1,000 rows. Each function can be interrupted and
repeated.
"""

from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from core import queue
from core.ids import first_id_at
from core.postgres.planner import equal, hidden
from core.postgres.protocols import Connection
from core.retention.partitions import (
    LOCK_CONFLICTS,
    PARTITION_KEYS,
    retry_lock_conflicts,
    walk_pages,
)
from core.retention.policy import RetentionPolicy

_PAGE_ROWS = 1000
_QUEUE_PAGE_ROWS = 20_000
_FIRST_ID = UUID(int=0)
#: Ids have the time of a server, `created_at` the time of the database.
_MAX_CLOCK_DIFFERENCE = timedelta(days=1)
_RUNS_KEPT = timedelta(days=90)

_EXISTING_PARTITIONS = """
SELECT c.relname FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
WHERE c.relname = ANY ($1) AND i.inhparent = ANY ($2::regclass[]) ORDER BY 1
"""

_FINISHED = """
WITH page AS MATERIALIZED (
    SELECT id, state, finished_at FROM {partition} WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3
), matched AS MATERIALIZED (
    SELECT id FROM page
    WHERE finished_at < CASE state WHEN 'delivered' THEN $4::timestamptz ELSE $5 END
){change}
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM matched) AS matched
"""
_DELETE_FINISHED = f""", deliveries AS (
    DELETE FROM {{partition}} f USING matched m WHERE {equal("f.id", "m.id")} RETURNING f.id
), attempts AS (
    DELETE FROM attempts a USING deliveries d WHERE {equal("a.delivery_id", "d.id")}
)"""  # noqa: S608 - constants

_EVENTS = """
WITH page AS MATERIALIZED (
    SELECT id, created_at FROM {partition} WHERE id > $1 AND id < $2 ORDER BY id LIMIT $3
), needed AS MATERIALIZED (
    SELECT event_id FROM finished_deliveries
    WHERE event_id > $1 AND event_id <= (SELECT id FROM page ORDER BY id DESC LIMIT 1)
    UNION
    SELECT event_id FROM open_events
    WHERE event_id > $1 AND event_id <= (SELECT id FROM page ORDER BY id DESC LIMIT 1)
), matched AS MATERIALIZED (
    SELECT id FROM page p
    WHERE created_at < $4 AND NOT EXISTS (SELECT FROM needed n WHERE n.event_id = p.id)
), events AS (DELETE FROM {partition} e USING matched m WHERE {same_id})
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last_id,
    (SELECT count(*) FROM matched) AS matched
"""

# `hidden` keeps the index by time out of the join, because nearly all keys may be old.
_DELETE_KEYS = f"""
WITH matched AS MATERIALIZED (
    SELECT merchant_id, key FROM idempotency_keys
    WHERE created_at < $1 ORDER BY created_at LIMIT $2
)
DELETE FROM idempotency_keys k USING matched m
WHERE {equal("k.merchant_id", "m.merchant_id")} AND {equal("k.key", "m.key")}
    AND {hidden("k.created_at")} < $1
"""  # noqa: S608 - constants

_DELETE_AUDIT_ENTRIES = f"""
WITH matched AS MATERIALIZED (
    SELECT id FROM audit_entries WHERE id < $3 AND created_at < $1 ORDER BY id LIMIT $2
)
DELETE FROM audit_entries a USING matched m WHERE {equal("a.id", "m.id")}
"""  # noqa: S608 - constants

# Keeps the run with the latest `removed_before`, in case the settings have changed since.
_DELETE_RUNS = """
DELETE FROM retention_runs WHERE began_at < $1 AND coalesce(removed_before, '-infinity') <= (
    SELECT coalesce(max(removed_before), '-infinity') FROM retention_runs WHERE began_at >= $1
)
"""

_CREATE_OPEN_EVENTS = """
DROP TABLE IF EXISTS pg_temp.open_events;
CREATE TEMPORARY TABLE open_events (event_id UUID PRIMARY KEY)
"""
_ADD_OPEN_EVENTS = "INSERT INTO open_events SELECT * FROM unnest($1::uuid[]) ON CONFLICT DO NOTHING"


async def remove_finished(
    connection: Connection, policy: RetentionPolicy, *, dry_run: bool = False
) -> int:
    """Remove old finished deliveries with all their attempts. A dry run only counts them."""
    removed = 0
    for partition in await undated_partitions(connection, "finished_deliveries"):
        change = "" if dry_run else _DELETE_FINISHED.format(partition=partition)
        removed += await walk_pages(
            connection,
            _FINISHED.format(partition=partition, change=change),
            _FIRST_ID,
            # A delivery that ended before this moment was created before it.
            first_id_at(policy.delivered_before),
            _PAGE_ROWS,
            policy.delivered_before,
            policy.undelivered_before,
        )
    return removed


async def collect_open_events(connection: Connection, policy: RetentionPolicy) -> None:
    """Fill the temporary table `open_events` with old events that have an open delivery.

    Afterwards only a redelivery makes another old event needed, and its original delivery still
    exists then.
    """
    await connection.execute(_CREATE_OPEN_EVENTS)
    bound = first_id_at(policy.delivered_before)
    after: UUID | None = _FIRST_ID
    while after is not None:
        after, events = await queue.old_events_of_open(connection, after, bound, _QUEUE_PAGE_ROWS)
        if events:
            await connection.execute(_ADD_OPEN_EVENTS, events)


async def remove_events(connection: Connection, policy: RetentionPolicy) -> int:
    """Remove old events without an open delivery (by `open_events`) or a kept delivery."""
    removed = 0
    for partition in await undated_partitions(connection, "events"):
        removed += await walk_pages(
            connection,
            _EVENTS.format(partition=partition, same_id=equal("e.id", "m.id")),
            _FIRST_ID,
            first_id_at(policy.delivered_before, _MAX_CLOCK_DIFFERENCE),
            _PAGE_ROWS,
            policy.delivered_before,
        )
    return removed


async def count_keys(connection: Connection, before: datetime) -> int:
    query = "SELECT count(*) FROM idempotency_keys WHERE created_at < $1"
    return int(await connection.fetchval(query, before))


async def count_audit_entries(connection: Connection, before: datetime) -> int:
    query = "SELECT count(*) FROM audit_entries WHERE id < $2 AND created_at < $1"
    bound = first_id_at(before, _MAX_CLOCK_DIFFERENCE)
    return int(await connection.fetchval(query, before, bound))


async def remove_keys(connection: Connection, before: datetime) -> int:
    return await _delete(connection, _DELETE_KEYS, before)


async def remove_audit_entries(connection: Connection, before: datetime) -> int:
    bound = first_id_at(before, _MAX_CLOCK_DIFFERENCE)
    return await _delete(connection, _DELETE_AUDIT_ENTRIES, before, bound)


async def remove_runs(connection: Connection, now: datetime) -> None:
    await connection.execute(_DELETE_RUNS, now - _RUNS_KEPT)


async def undated_partitions(connection: Connection, table: str) -> list[str]:
    """Return the partitions of a table that belong to no day.

    `before` holds the rows from before there were daily partitions, until it is dropped.
    """
    names = [f"{table}_{suffix}" for suffix in ("before", "default", "kept")]
    rows = await connection.fetch(_EXISTING_PARTITIONS, names, [table, f"{table}_by_day"])
    return [row["relname"] for row in rows]


async def drop_empty_before_partitions(connection: Connection) -> list[str]:
    """Drop the `before` partitions that are empty. They get no new rows."""
    dropped = []
    for table in PARTITION_KEYS:
        partition = f"{table}_before"
        if partition not in await undated_partitions(connection, table):
            continue
        query = f"SELECT EXISTS (SELECT FROM {partition})"  # noqa: S608 - constants
        if not await connection.fetchval(query):
            with suppress(*LOCK_CONFLICTS):
                await retry_lock_conflicts(connection.execute, f"DROP TABLE {partition}")
                dropped.append(partition)
    return dropped


async def _delete(connection: Connection, statement: str, *arguments: object) -> int:
    """Repeat a DELETE with the limit as its second argument, until it finds no full page."""
    first, *others = arguments
    total = 0
    while True:
        tag: str = await retry_lock_conflicts(
            connection.execute, statement, first, _PAGE_ROWS, *others
        )
        deleted = int(tag.rpartition(" ")[2])
        total += deleted
        if deleted < _PAGE_ROWS:
            return total
