"""Reads accepted events, without their payloads; always of one merchant, or of one id."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from core.ids import first_id_at
from core.postgres.protocols import Executor

_ID_MAX = UUID(int=(1 << 128) - 1)
#: An id has its server's time from before the commit, an event the database's time of it. What
#: lies between them, waiting and the clocks' difference together, is taken to be less than this.
_SKEW = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class EventRow:
    """An accepted event."""

    id: UUID
    merchant_id: str
    type: str
    created_at: datetime
    delivery_count: int
    not_before: datetime | None
    ordering_key: str | None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What to list; None does not filter. `before` is the id where the page before ended."""

    type: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    before: UUID | None = None


_COLUMNS = "id, merchant_id, type, created_at, delivery_count, not_before, ordering_key"
_ONE = f"SELECT {_COLUMNS} FROM events WHERE id = $1"  # noqa: S608 - of our own parts
# The ids bound the partitions and the part of the index that is read; the times are exact.
_LIST = (
    f"SELECT {_COLUMNS} FROM events "  # noqa: S608 - of our own parts
    "WHERE merchant_id = $1 AND id >= $2 AND id < $3{filters} ORDER BY id DESC LIMIT $4"
)


async def find_event(pool: Executor, merchant_id: str | None, event_id: UUID) -> EventRow | None:
    """One event, of this merchant when there is one given."""
    row = await pool.fetchrow(_ONE, event_id)
    if row is None or merchant_id not in (None, row["merchant_id"]):
        return None
    return EventRow(**row)


async def list_events(
    pool: Executor, merchant_id: str, wanted: EventFilter, limit: int
) -> list[EventRow]:
    """At most `limit` events of a merchant, newest first."""
    statement, arguments = _page(merchant_id, wanted, limit)
    return [EventRow(**row) for row in await pool.fetch(statement, *arguments)]


def _page(merchant_id: str, wanted: EventFilter, limit: int) -> tuple[str, list[object]]:
    """The statement of a page, with its arguments."""
    lowest = first_id_at(wanted.start, -_SKEW) if wanted.start else UUID(int=0)
    highest = first_id_at(wanted.end, _SKEW) if wanted.end else _ID_MAX
    if wanted.before is not None:
        highest = min(highest, wanted.before)
    arguments: list[object] = [merchant_id, lowest, highest, limit]
    filters = ""
    for condition, value in (
        ("type =", wanted.type),
        ("created_at >=", wanted.start),
        ("created_at <", wanted.end),
    ):
        if value is not None:
            arguments.append(value)
            filters += f" AND {condition} ${len(arguments)}"
    return _LIST.format(filters=filters), arguments
