"""Cancelling the open deliveries of a deleted config."""

import asyncio
import sys
from typing import Any
from uuid import UUID

import pytest

from core import queue
from tests.support.factories import (
    attempts,
    lease_one,
    make_delivery,
    make_webhook_config,
    mark_deleted,
    places,
    promptly,
    settle,
    settlement,
    states,
    until_blocked,
)


async def test_cancel_webhook_ends_only_its_open_deliveries(pool: Any) -> None:
    webhook_id, other = [await make_webhook_config(pool) for _ in range(2)]
    open_deliveries = {
        await make_delivery(pool, webhook_id, state=state, attempt_count=count)
        for count, state in enumerate(("ready", "leased", "parked"))
    }
    await make_delivery(pool, other)

    assert await queue.cancel_webhook(pool, webhook_id) == 3

    assert await states(pool, other) == ["ready"]
    finished = await pool.fetch("SELECT * FROM finished_deliveries ORDER BY attempt_count")
    assert {row["id"] for row in finished} == open_deliveries
    assert [(row["state"], row["attempt_count"]) for row in finished] == [
        ("cancelled", count) for count in range(3)
    ]
    assert await queue.cancel_webhook(pool, webhook_id) == 0


async def test_cancel_runs_in_chunks(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by its dotted name, which `core.queue` gives to the function.
    monkeypatch.setattr(sys.modules["core.queue.settle"], "_CHUNK", 2)
    webhook_id = await make_webhook_config(pool)
    for state in ("parked", "parked", "ready", "parked", "leased"):
        await make_delivery(pool, webhook_id, state=state)

    assert await queue.cancel_some(pool, webhook_id) == 2
    assert await states(pool, webhook_id) == ["cancelled"] * 2 + ["parked"] * 3
    assert await queue.cancel_webhook(pool, webhook_id) == 3

    assert await states(pool, webhook_id) == ["cancelled"] * 5
    statements = "SELECT count(DISTINCT xmin::text) FROM finished_deliveries"
    assert await pool.fetchval(statements) == 3


async def test_delivery_cancelled_in_flight_stays_cancelled(pool: Any, webhook_id: UUID) -> None:
    delivery = await lease_one(pool, webhook_id)
    await queue.cancel_webhook(pool, webhook_id)

    assert (await settle(pool, settlement(delivery))).delivery_ids == frozenset()

    assert await states(pool) == ["cancelled"]
    assert await attempts(pool) == []


async def test_cancel_does_not_deadlock_with_a_waiting_settle(pool: Any) -> None:
    # Deleting locks the config, then its deliveries; a settle has the delivery, and then wants to
    # reset the config's count.
    webhook_id = await make_webhook_config(pool, consecutive_failures=1)
    delivery = await lease_one(pool, webhook_id)
    waiting = await make_delivery(pool, webhook_id)
    async with pool.acquire() as connection, connection.transaction():
        await mark_deleted(connection, webhook_id)
        settling = asyncio.create_task(settle(pool, settlement(delivery)))
        await until_blocked(pool)
        assert await promptly(queue.cancel_webhook(connection, webhook_id)) == 1

    assert (await settling).delivery_ids == {delivery.id}
    found = await places(pool)
    assert (found[delivery.id].state, found[waiting].state) == ("delivered", "cancelled")
