"""Inserts rows whose ids and times are a number of days in the past."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from core.ids import first_id_at, new_id
from core.retention.partitions import Day, create_day
from tests.support.factories import EVENT_TYPE, MERCHANT

_RANDOM = (1 << 80) - 1


def id_of(days_ago: float) -> UUID:
    """A UUIDv7 with a timestamp in the past."""
    moment = datetime.now(UTC) - timedelta(days=days_ago)
    return UUID(int=first_id_at(moment).int | new_id().int & _RANDOM)


def day_of(days_ago: float) -> Day:
    return Day((datetime.now(UTC) - timedelta(days=days_ago)).date())


async def make_days(pool: Any, *days_ago: float) -> None:
    """Create the partitions of these days."""
    async with pool.acquire() as connection:
        for number in days_ago:
            assert await create_day(connection, day_of(number))


async def past_event(pool: Any, days_ago: float, **overrides: Any) -> UUID:
    row = {
        "id": id_of(days_ago),
        "merchant_id": MERCHANT,
        "type": EVENT_TYPE,
        "content_type": "application/json",
        "payload": b'{"amount": 1}',
        "delivery_count": 1,
        "created_at": datetime.now(UTC) - timedelta(days=days_ago),
        **overrides,
    }
    await _insert(pool, "events", row)
    return UUID(str(row["id"]))


async def past_delivery(
    pool: Any,
    webhook_id: UUID,
    days_ago: float,
    state: str = "delivered",
    *,
    ended_days_ago: float | None = None,
    event_id: UUID | None = None,
    **overrides: Any,
) -> tuple[UUID, UUID]:
    """A finished delivery with one attempt. Returns the ids of the delivery and its event."""
    ended = days_ago if ended_days_ago is None else ended_days_ago
    event_id = event_id or await past_event(pool, days_ago)
    attempts = 0 if state == "cancelled" else 1
    row = {
        "id": id_of(days_ago),
        "state": state,
        "webhook_id": webhook_id,
        "event_id": event_id,
        "merchant_id": MERCHANT,
        "event_type": EVENT_TYPE,
        "attempt_count": attempts,
        "created_at": datetime.now(UTC) - timedelta(days=days_ago),
        "finished_at": datetime.now(UTC) - timedelta(days=ended),
        **overrides,
    }
    await _insert(pool, "finished_deliveries", row)
    if attempts:
        await past_attempt(pool, row["id"], "succeeded" if state == "delivered" else "timeout")
    return UUID(str(row["id"])), event_id


async def past_pending(
    pool: Any, webhook_id: UUID, days_ago: float, **overrides: Any
) -> tuple[UUID, UUID]:
    """A parked delivery. Returns the ids of the delivery and its event."""
    event_id = overrides.pop("event_id", None) or await past_event(pool, days_ago)
    row = {
        "id": id_of(days_ago),
        "state": "parked",
        "webhook_id": webhook_id,
        "event_id": event_id,
        "merchant_id": MERCHANT,
        "event_type": EVENT_TYPE,
        "created_at": datetime.now(UTC) - timedelta(days=days_ago),
        **overrides,
    }
    await _insert(pool, "delivery_queue", row)
    return UUID(str(row["id"])), event_id


async def past_attempt(pool: Any, delivery_id: UUID, outcome: str, number: int = 1) -> None:
    row = {
        "delivery_id": delivery_id,
        "number": number,
        "outcome": outcome,
        "detail": outcome,
        "started_at": datetime.now(UTC),
        "duration_us": 1,
    }
    await _insert(pool, "attempts", row)


async def _insert(pool: Any, table: str, row: dict[str, Any]) -> None:
    parameters = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({parameters})"  # noqa: S608
    await pool.execute(statement, *row.values())
