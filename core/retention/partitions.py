"""Daily partitions of events and history. A row belongs to the day (UTC) of its UUIDv7.

Statements here wait for locks only briefly, because later statements queue behind a waiting lock.
A row whose day has no partition goes to the default partition, so no insert fails.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from random import uniform
from typing import Any
from uuid import UUID

import asyncpg

from core.ids import first_id_at
from core.postgres.protocols import Connection, Executor

#: Number of days after today that get their partitions ahead of time.
DAYS_AHEAD = 7
#: The tables, each with the id column that selects the partition.
PARTITION_KEYS = {"events": "id", "finished_deliveries": "id", "attempts": "delivery_id"}
#: A delivery and its attempts are dropped together.
HISTORY_TABLES = ("finished_deliveries", "attempts")
EVENT_TABLES = ("events",)

#: Longest wait for a lock, because other sessions queue behind it meanwhile.
LOCK_SECONDS = 0.1
#: Longest statement under a lock that blocks other sessions.
LOCKED_STATEMENT_SECONDS = 1.0
#: Begins each transaction with such a lock. A longer statement raises QueryCanceledError.
LIMIT_STATEMENTS = f"SET LOCAL statement_timeout = {LOCKED_STATEMENT_SECONDS * 1000:.0f}"

#: Another session holds the lock, or we were in its way.
LOCK_CONFLICTS = (
    asyncpg.exceptions.LockNotAvailableError,
    asyncpg.exceptions.TransactionRollbackError,
)
_TRIES = 20
_PAUSE_SECONDS = (0.05, 0.5)

_NAME = re.compile(r"(events|finished_deliveries|attempts)_(\d{8})")

_PARTITIONS = """
SELECT c.relname AS name, pg_total_relation_size(c.oid) AS bytes
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = ANY ($1::regclass[])
ORDER BY c.relname
"""


@dataclass(frozen=True, slots=True)
class Day:
    """A day in UTC as a range of ids: `low` is inclusive, `high` exclusive."""

    date: date

    @property
    def low(self) -> UUID:
        return first_id_at(datetime.combine(self.date, time(), UTC))

    @property
    def high(self) -> UUID:
        return self.later(1).low

    @property
    def end(self) -> datetime:
        return datetime.combine(self.date, time(), UTC) + timedelta(days=1)

    def later(self, days: int) -> "Day":
        return Day(self.date + timedelta(days=days))

    def partition(self, table: str) -> str:
        """Return the name of this day's partition of a table."""
        return f"{table}_{self.date:%Y%m%d}"


@dataclass(frozen=True, slots=True)
class Partition:
    """A daily partition. `bytes` includes indexes."""

    table: str
    day: Day
    bytes: int


async def list_partitions(
    connection: Executor, tables: Sequence[str] = tuple(PARTITION_KEYS)
) -> list[Partition]:
    """Return the daily partitions of these tables."""
    rows = await connection.fetch(_PARTITIONS, [f"{table}_by_day" for table in tables])
    return [
        Partition(match[1], Day(date.fromisoformat(match[2])), row["bytes"])
        for row in rows
        if (match := _NAME.fullmatch(row["name"]))
    ]


async def today(connection: Executor) -> Day:
    """Return the current day of the database's clock."""
    return Day(await connection.fetchval("SELECT (now() AT TIME ZONE 'UTC')::date"))


async def days_ahead(connection: Executor) -> int:
    """Count the days after today, up to the first gap, that have all partitions.

    Returns -1 if today lacks one. Reads only the catalogue. It is the metric
    postrider_partition_days_ahead.
    """
    first = await today(connection)
    missing = await missing_days(connection, first)
    return (missing[0].date - first.date).days - 1 if missing else DAYS_AHEAD


async def missing_days(connection: Executor, first: Day) -> list[Day]:
    """Return `first` and the days ahead that lack a partition."""
    existing = {(p.table, p.day) for p in await list_partitions(connection)}
    days = [first.later(number) for number in range(DAYS_AHEAD + 1)]
    return [day for day in days if any((table, day) not in existing for table in PARTITION_KEYS)]


async def create_day(connection: Connection, day: Day) -> bool:
    """Create the day's partitions of all tables, or none if a default partition has its rows.

    Attaching a partition locks only the default partition, which PostgreSQL scans for rows of the
    day. Raises QueryCanceledError if it is so full that the scan would block others.
    """
    for table in PARTITION_KEYS:
        if await _default_has_rows(connection, table, day):
            return False
    # One message with its own implicit transaction, so that the locks end even if this process
    # freezes. idle_in_transaction_session_timeout does not cover a half-prepared statement.
    statements = [LIMIT_STATEMENTS]
    for table in PARTITION_KEYS:
        name, ids = day.partition(table), f"FROM ('{day.low}') TO ('{day.high}')"
        statements += [
            f"CREATE TABLE {name} (LIKE {table}_default INCLUDING ALL)",
            f"ALTER TABLE {table}_by_day ATTACH PARTITION {name} FOR VALUES {ids}",
        ]
    try:
        await connection.execute(";".join(statements))
    except (asyncpg.CheckViolationError, asyncpg.DuplicateTableError):
        # A row or a partition appeared since the check.
        return False
    return True


async def lock_daily_partitions(connection: Connection, tables: Sequence[str]) -> None:
    """Block all access to the daily partitions of these tables until the transaction ends.

    Prepare the following statements before, for the reason given in `create_day`.
    """
    names = ", ".join(f"ONLY {table}_by_day" for table in tables)
    await connection.execute(f"{LIMIT_STATEMENTS}; LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")


async def drop_day(connection: Connection, tables: Sequence[str], day: Day) -> None:
    names = ", ".join(day.partition(table) for table in tables)
    await connection.execute(f"DROP TABLE IF EXISTS {names}")


async def retry_lock_conflicts[T](call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Return the result of the call. Raises one of LOCK_CONFLICTS after 20 tries.

    Retention waits for locks briefly and often, so that it never blocks others for long.
    """
    for _ in range(_TRIES - 1):
        try:
            return await call(*arguments)
        except LOCK_CONFLICTS:
            await asyncio.sleep(uniform(*_PAUSE_SECONDS))  # noqa: S311 - not a secret
    return await call(*arguments)


async def walk_pages(
    connection: Connection,
    statement: str,
    after: UUID,
    before: UUID,
    page_rows: int,
    *arguments: object,
) -> int:
    """Run the statement for each page of ids in (after, before). Returns the sum of `matched`.

    The statement takes the bounds, the number of rows per page and the further arguments. It
    returns `last_id`, which is NULL after the last page, and `matched`.
    """
    matched = 0
    while True:
        row = await retry_lock_conflicts(
            connection.fetchrow, statement, after, before, page_rows, *arguments
        )
        if row["last_id"] is None:
            return matched
        matched += row["matched"]
        after = row["last_id"]


async def _default_has_rows(connection: Connection, table: str, day: Day) -> bool:
    in_day = f"{PARTITION_KEYS[table]} >= $1 AND {PARTITION_KEYS[table]} < $2"
    query = f"SELECT EXISTS (SELECT FROM {table}_default WHERE {in_day})"  # noqa: S608 - constants
    found: bool = await connection.fetchval(query, day.low, day.high)
    return found
