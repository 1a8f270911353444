"""Valid rows and values. A test passes only the fields that it is about."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from core import queue
from core.ids import format_id, new_id
from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.queue import LeasedDelivery, NewEvent, Settlement, SettleResult

MERCHANT = "m_1"
EVENT_TYPE = "payment.succeeded"
STARTED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Place:
    """The state of a delivery in the database, in the queue or finished."""

    state: str
    attempt_count: int
    reclaim_count: int | None = None
    due_in: float | None = None
    lease_id: UUID | None = None


async def make_webhook_config(pool: Any, **overrides: Any) -> UUID:
    """An active webhook config of MERCHANT for EVENT_TYPE; its secret is not a real one."""
    row: dict[str, Any] = {
        "id": new_id(),
        "merchant_id": MERCHANT,
        "url": "https://merchant.example/hooks",
        "events": [EVENT_TYPE],
        "secret_ciphertext": b"sealed",
        "secret_key_id": "k1",
        **overrides,
    }
    if row.get("active") is False:
        row.setdefault("deactivation_reason", "paused")
    places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    await pool.execute(
        f"INSERT INTO webhook_configs ({', '.join(row)}) VALUES ({places})",  # noqa: S608
        *row.values(),
    )
    return UUID(str(row["id"]))


def make_event(**overrides: Any) -> NewEvent:
    """An event of MERCHANT and EVENT_TYPE without an idempotency key."""
    fields: dict[str, Any] = {
        "id": new_id(),
        "merchant_id": MERCHANT,
        "type": EVENT_TYPE,
        "content_type": "application/json",
        "payload": b'{"amount": 1}',
        "idempotency_key": None,
        "content_hash": b"hash",
        **overrides,
    }
    return NewEvent(**fields)


async def enqueue_events(pool: Any, count: int = 1, **overrides: Any) -> list[NewEvent]:
    """Accept events in one batch."""
    events = [make_event(**overrides) for _ in range(count)]
    await queue.enqueue(pool, events)
    return events


async def make_delivery(pool: Any, webhook_id: UUID, **overrides: Any) -> UUID:
    """A queue row and its event, in any state. It is ready and due by default.

    `due_in` and `lease_in` are seconds from the database's now.
    """
    due_in = overrides.pop("due_in", 0.0)
    lease_in = overrides.pop("lease_in", None)
    [event] = await enqueue_events(pool, merchant_id="m_without_configs")
    row = {
        "id": new_id(),
        "state": "ready",
        "webhook_id": webhook_id,
        "event_id": event.id,
        "merchant_id": MERCHANT,
        "event_type": EVENT_TYPE,
        **overrides,
    }
    if row["state"] == "leased":
        row.setdefault("lease_id", new_id())
        lease_in = 60.0 if lease_in is None else lease_in
    places = ", ".join(f"${number}" for number in range(3, len(row) + 3))
    await pool.execute(
        f"INSERT INTO delivery_queue (due_at, lease_until, {', '.join(row)}) VALUES "  # noqa: S608
        f"(now() + $1 * interval '1 second', now() + $2 * interval '1 second', {places})",
        due_in,
        lease_in,
        *row.values(),
    )
    return UUID(str(row["id"]))


async def mark_deleted(connection: Any, webhook_id: UUID) -> None:
    """Delete a config without cancelling its deliveries."""
    await connection.execute(
        "UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", webhook_id
    )


async def end_leases(pool: Any) -> None:
    await pool.execute(
        "UPDATE delivery_queue SET lease_until = now() - interval '1 second' WHERE state = 'leased'"
    )


async def lease_one(pool: Any, webhook_id: UUID, **overrides: Any) -> LeasedDelivery:
    """A claimed delivery. No other delivery may be due."""
    delivery_id = await make_delivery(pool, webhook_id, **overrides)
    [delivery] = await queue.claim(pool, 10, 60)
    assert delivery.id == delivery_id
    return delivery


async def lease_many(pool: Any, webhook_id: UUID, count: int) -> list[LeasedDelivery]:
    """Deliveries of a config, claimed with one lease. No other delivery may be due."""
    for _ in range(count):
        await make_delivery(pool, webhook_id)
    return await queue.claim(pool, count, 60)


def settlement(delivery: LeasedDelivery, **overrides: Any) -> Settlement:
    """A 200 that finishes the delivery. Overrides are fields of the settlement or its result."""
    result: dict[str, Any] = {"outcome": Outcome.SUCCEEDED, "status_code": 200, "detail": "200 OK"}
    result |= {"duration_us": 1500}
    result |= {name: overrides.pop(name) for name in AttemptResult._fields if name in overrides}
    fields: dict[str, Any] = {
        "delivery_id": delivery.id,
        "lease_id": delivery.lease_id,
        "webhook_id": delivery.webhook_id,
        "merchant_id": delivery.merchant_id,
        "due_since": delivery.due_since,
        "number": delivery.attempt_count + 1,
        "started_at": STARTED_AT,
        "result": AttemptResult(**result),
        "final_state": DeliveryState.DELIVERED,
        **overrides,
    }
    return Settlement(**fields)


def failed(delivery: LeasedDelivery, **overrides: Any) -> Settlement:
    """A 500 in the last attempt."""
    fields = {
        "outcome": Outcome.HTTP_ERROR,
        "status_code": 500,
        "detail": "500 Internal Server Error",
        "final_state": DeliveryState.FAILED,
    }
    return settlement(delivery, **fields | overrides)


def rescheduled(delivery: LeasedDelivery, seconds: float = 60.0, **overrides: Any) -> Settlement:
    """A 500 before the last attempt."""
    return failed(delivery, final_state=None, next_attempt_in_seconds=seconds, **overrides)


async def fail_open_delivery(pool: Any) -> str:
    """Finish one open delivery as failed. Returns its prefixed id."""
    row = await pool.fetchrow("""
        WITH finished AS (
            DELETE FROM delivery_queue WHERE id IN (SELECT id FROM delivery_queue LIMIT 1)
            RETURNING *
        )
        INSERT INTO finished_deliveries
            (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at)
        SELECT id, 'failed', webhook_id, event_id, merchant_id, event_type, 1, created_at
        FROM finished RETURNING id
    """)
    return format_id("dlv", row["id"])


async def settle(pool: Any, *settlements: Settlement, limit: int = 10) -> SettleResult:
    """Settle as the recorder does, in a transaction."""
    async with pool.acquire() as connection, connection.transaction():
        return await queue.settle(connection, settlements, limit)


async def places(pool: Any) -> dict[UUID, Place]:
    """The state of each delivery. Fails if one is both in the queue and finished."""
    rows = await pool.fetch("""
        SELECT id, state, attempt_count, reclaim_count, lease_id,
            CASE WHEN isfinite(due_at) THEN extract(epoch FROM due_at - now())::float8 END AS due_in
        FROM delivery_queue
        UNION ALL
        SELECT id, state, attempt_count, NULL, NULL, NULL FROM finished_deliveries
    """)
    found = {row["id"]: Place(**{k: v for k, v in row.items() if k != "id"}) for row in rows}
    assert len(found) == len(rows), "a delivery is in the queue and finished at once"
    return found


async def states(pool: Any, webhook_id: UUID | None = None) -> list[str]:
    """The states of all deliveries, or of one config's, sorted."""
    rows = await pool.fetch(
        """
        SELECT state FROM delivery_queue WHERE $1::uuid IS NULL OR webhook_id = $1
        UNION ALL
        SELECT state FROM finished_deliveries WHERE $1::uuid IS NULL OR webhook_id = $1
        """,
        webhook_id,
    )
    return sorted(row["state"] for row in rows)


async def attempts(pool: Any) -> list[tuple[UUID, int, str]]:
    """(delivery, number, outcome) of each recorded attempt, in order."""
    rows = await pool.fetch(
        "SELECT delivery_id, number, outcome FROM attempts ORDER BY delivery_id, number"
    )
    return [tuple(row) for row in rows]


async def health(pool: Any, webhook_id: UUID) -> tuple[bool, str | None, int]:
    """(active, deactivation_reason, consecutive_failures) of a config."""
    row = await pool.fetchrow(
        "SELECT active, deactivation_reason, consecutive_failures FROM webhook_configs"
        " WHERE id = $1",
        webhook_id,
    )
    return tuple(row)


async def count_rows(pool: Any, table: str = "events") -> int:
    rows: int = await pool.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
    return rows


async def until_blocked(pool: Any, count: int = 1) -> None:
    """Return when this many sessions of the database wait for a lock."""
    query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    async with asyncio.timeout(10):
        while await pool.fetchval(query) < count:
            pass


@asynccontextmanager
async def locked(pool: Any, table: str = "events") -> AsyncIterator[None]:
    """Lock a table against changes."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(f"LOCK TABLE {table} IN SHARE MODE")
        yield


async def terminate_blocked(pool: Any) -> None:
    """Terminate the sessions of this database that wait for a lock, once there is one."""
    await until_blocked(pool)
    await pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )


async def promptly[T](awaitable: Awaitable[T]) -> T:
    """Fails if the awaitable waits, for example for a lock."""
    return await asyncio.wait_for(awaitable, 5)


def ids_of(deliveries: Sequence[LeasedDelivery]) -> set[UUID]:
    return {delivery.id for delivery in deliveries}
