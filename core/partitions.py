"""Which days have a partition, read from the catalog: the tables of what is kept, by ranges of
UUIDv7 ids, which begin with the time."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from core.queue import Connection

_BOUNDS = """
SELECT parent.relname AS name, pg_get_expr(part.relpartbound, part.oid) AS bounds
FROM pg_class parent
JOIN pg_namespace n ON n.oid = parent.relnamespace AND n.nspname = current_schema()
LEFT JOIN pg_inherits i ON i.inhparent = parent.oid
LEFT JOIN pg_class part ON part.oid = i.inhrelid
WHERE parent.relkind = 'p'
"""
_RANGE = re.compile(r"FROM \('([0-9a-f-]{36})'\) TO \('([0-9a-f-]{36})'\)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

type Range = tuple[datetime, datetime]


async def partition_days_ahead(connection: Connection, now: datetime) -> int:
    """For how many whole days from `now` on every partitioned table has a place for each moment.

    The default partitions do not count: they take what has no place, and cannot be dropped by day.
    """
    ranges: dict[str, list[Range]] = {}
    for row in await connection.fetch(_BOUNDS):
        of_table = ranges.setdefault(row["name"], [])
        if found := _RANGE.search(row["bounds"] or ""):
            of_table.append((_time(found[1]), _time(found[2])))
    return min((days_covered(of_table, now) for of_table in ranges.values()), default=0)


def days_covered(ranges: Iterable[Range], now: datetime) -> int:
    """Whole days from `now` to the end of the ranges, or to the first moment between them."""
    covered_until = now
    for begin, end in sorted(ranges):
        if begin <= covered_until < end:
            covered_until = end
    return (covered_until - now) // timedelta(days=1)


def _time(bound: str) -> datetime:
    return _EPOCH + timedelta(milliseconds=UUID(bound).int >> 80)
