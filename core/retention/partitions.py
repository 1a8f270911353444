"""Days: the parts of events and history, each with the rows whose ids are of one day in UTC.

Every statement here takes its locks at once or gives way, since behind a lock that waits all others
queue. A row whose day has no part of its own goes to the default part: none is ever refused.
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
from core.postgres.connect import Connection
from core.postgres.pool import Pool

#: How many whole days ahead have their parts.
AHEAD = 7
#: The key by whose range a table's days are divided.
KEYS = {"events": "id", "finished_deliveries": "id", "attempts": "delivery_id"}
#: A delivery and its attempts come and go together.
HISTORY = ("finished_deliveries", "attempts")
EVENTS = ("events",)

_NAME = re.compile(r"(events|finished_deliveries|attempts)_(\d{8})")

_PARTS = """
SELECT c.relname AS name, greatest(c.reltuples, 0)::bigint AS rows,
    pg_total_relation_size(c.oid) AS bytes
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = ANY ($1::regclass[])
ORDER BY c.relname
"""


@dataclass(frozen=True, slots=True)
class Day:
    """A day in UTC, as a range of ids: from `low` to before `high`."""

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

    def part(self, table: str) -> str:
        return f"{table}_{self.date:%Y%m%d}"


@dataclass(frozen=True, slots=True)
class Part:
    """A day's part of a table; `rows` is PostgreSQL's estimate, `bytes` with indexes."""

    table: str
    day: Day
    rows: int
    bytes: int


async def parts(connection: Connection, tables: Sequence[str] = tuple(KEYS)) -> list[Part]:
    """The parts of these tables that are of one day."""
    rows = await connection.fetch(_PARTS, [f"{table}_by_day" for table in tables])
    found = ((_NAME.fullmatch(row["name"]), row) for row in rows)
    return [
        Part(
            match[1],
            Day(datetime.strptime(match[2], "%Y%m%d").replace(tzinfo=UTC).date()),
            row["rows"],
            row["bytes"],
        )
        for match, row in found
        if match
    ]


async def today(connection: Connection) -> Day:
    """By the database's clock."""
    return Day(await connection.fetchval("SELECT (now() AT TIME ZONE 'UTC')::date"))


async def days_ahead(connection: Pool) -> int:
    """How many whole days after today have a part in every table; -1: not even today.

    Up to the first gap, from the catalogue alone; for the metric postrider_partition_days_ahead.
    """
    there = [{part.day for part in await parts(connection, (table,))} for table in KEYS]
    complete = set.intersection(*there)
    day, count = await today(connection), -1
    while day in complete:
        day, count = day.later(1), count + 1
    return count


async def missing_days(connection: Connection) -> list[Day]:
    """Today and the days ahead that have no parts yet."""
    there = {(part.table, part.day) for part in await parts(connection)}
    first = await today(connection)
    wanted = [first.later(number) for number in range(AHEAD + 1)]
    return [day for day in wanted if any((table, day) not in there for table in KEYS)]


async def make_day(connection: Connection, day: Day) -> bool:
    """Make the day's parts in all three tables, or, where one has rows of it already, in none.

    Attaching does not lock the table, only the default part, which is read for rows of the day: it
    is nearly empty. Rows that are there already stay there and are removed row by row.
    QueryCanceledError when it is so full that reading it would hold others up.
    """
    for table in KEYS:
        if await _default_has(connection, table, day):
            return False
    # One message, and its own transaction: the server needs nothing more of us to let go of the
    # locks. It bounds how long we are idle in a transaction, but not how long within a statement
    # that is being prepared.
    statements = [BOUND_STATEMENTS]
    for table in KEYS:
        name, ids = day.part(table), f"FROM ('{day.low}') TO ('{day.high}')"
        statements += [
            f"CREATE TABLE {name} (LIKE {table}_default INCLUDING ALL)",
            f"ALTER TABLE {table}_by_day ATTACH PARTITION {name} FOR VALUES {ids}",
        ]
    try:
        await connection.execute(";".join(statements))
    except (asyncpg.CheckViolationError, asyncpg.DuplicateTableError):
        # Came in between.
        return False
    return True


async def lock_days(connection: Connection, tables: Sequence[str]) -> None:
    """In a transaction: nobody reads or writes these tables' days until it ends.

    What follows in it must have been prepared before, for the reason that make_day() gives.
    """
    names = ", ".join(f"ONLY {table}_by_day" for table in tables)
    await connection.execute(f"{BOUND_STATEMENTS}; LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")


async def drop_parts(connection: Connection, tables: Sequence[str], day: Day) -> None:
    names = ", ".join(day.part(table) for table in tables)
    await connection.execute(f"DROP TABLE IF EXISTS {names}")


async def _default_has(connection: Connection, table: str, day: Day) -> bool:
    of_day = f"{KEYS[table]} >= $1 AND {KEYS[table]} < $2"
    query = f"SELECT EXISTS (SELECT FROM {table}_default WHERE {of_day})"  # noqa: S608 - of constants
    found: bool = await connection.fetchval(query, day.low, day.high)
    return found


# Trying again after a short wait: retention waits for a lock briefly and often, never long.

#: Longest wait for a lock: so long everybody else may queue behind it.
LOCK_SECONDS = 0.1
#: Longest statement under a lock that others wait for.
HOLD_SECONDS = 1.0
#: In a transaction that takes such a lock: QueryCanceledError for what takes too long in it.
BOUND_STATEMENTS = f"SET LOCAL statement_timeout = {HOLD_SECONDS * 1000:.0f}"
_TRIES = 20
_PAUSE_SECONDS = (0.05, 0.5)

#: Others hold what we want, or we were in their way.
GAVE_WAY = (
    asyncpg.exceptions.LockNotAvailableError,
    asyncpg.exceptions.TransactionRollbackError,
)


async def patiently[T](call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """What the call returns; after so many tries what it raises, one of GAVE_WAY."""
    for _ in range(_TRIES - 1):
        try:
            return await call(*arguments)
        except GAVE_WAY:
            await asyncio.sleep(uniform(*_PAUSE_SECONDS))  # noqa: S311 - not a secret
    return await call(*arguments)
