"""Parking deliveries and admitting them from the backlog."""

from collections import Counter
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from core import queue
from core.ids import new_id
from tests.support.factories import (
    enqueue_events,
    ids_of,
    make_delivery,
    make_event,
    make_webhook_config,
    mark_deleted,
    places,
    promptly,
    states,
)


@pytest.mark.parametrize(
    ("park", "future_state"), [(queue.park_webhooks, "parked"), (queue.park_due, "ready")]
)
async def test_park_moves_only_ready_deliveries_of_its_config(
    pool: Any, webhook_id: UUID, park: Any, future_state: str
) -> None:
    """`park_due` leaves deliveries that are due later."""
    other = await make_webhook_config(pool)
    for state in ("ready", "ready", "leased", "parked"):
        await make_delivery(pool, webhook_id, state=state)
    await make_delivery(pool, webhook_id, due_in=60)
    await make_delivery(pool, other)

    await park(pool, [webhook_id])

    expected = ["leased", "parked", "parked", "parked", future_state]
    assert await states(pool, webhook_id) == expected
    assert await states(pool, other) == ["ready"]


async def test_backlog_is_admitted_oldest_first_up_to_the_limit(
    pool: Any, webhook_id: UUID
) -> None:
    backlog = [await make_delivery(pool, webhook_id, state="parked") for _ in range(6)]

    assert await queue.admit(pool, {webhook_id: 4}) == {webhook_id}

    found = await places(pool)
    assert [found[delivery_id].state for delivery_id in backlog] == ["ready"] * 4 + ["parked"] * 2


async def test_admission_fills_free_slots_once_half_are_free(pool: Any) -> None:
    for ready, leased, size, admitted in [
        (0, 0, 8, 8),
        (1, 2, 8, 5),
        (2, 2, 8, 4),
        (3, 2, 8, 0),  # not half empty: not worth the write
        (8, 0, 8, 0),
        (9, 3, 8, 0),
        (0, 0, 1, 1),
        (1, 0, 1, 0),
        (1, 0, 2, 1),
        (1, 0, 3, 2),
        (2, 0, 3, 0),
    ]:
        webhook_id = await make_webhook_config(pool)
        for state, count in (("ready", ready), ("leased", leased), ("parked", 10)):
            for _ in range(count):
                await make_delivery(pool, webhook_id, state=state, due_in=-1)

        fed = await queue.admit(pool, {webhook_id: size})

        assert fed == ({webhook_id} if admitted else set())
        assert Counter(await states(pool, webhook_id))["ready"] == ready + admitted


async def test_future_retries_take_no_slots(pool: Any, webhook_id: UUID) -> None:
    for _ in range(4):
        await make_delivery(pool, webhook_id, due_in=60)
    parked = await make_delivery(pool, webhook_id, state="parked")

    assert await queue.admit(pool, {webhook_id: 4}) == {webhook_id}
    assert ids_of(await queue.claim(pool, 10, 30)) == {parked}


async def test_admitted_delivery_does_not_overtake_others(pool: Any) -> None:
    flooded, healthy = [await make_webhook_config(pool) for _ in range(2)]
    await make_delivery(pool, flooded, state="parked", due_in=-3600)
    theirs = await make_delivery(pool, healthy, due_in=-1)

    await queue.admit(pool, {flooded: 4})

    assert ids_of(await queue.claim(pool, 1, 30)) == {theirs}


async def test_parked_retry_keeps_its_backoff(pool: Any, webhook_id: UUID) -> None:
    delivery_id = await make_delivery(pool, webhook_id, state="parked", due_in=60)

    await queue.admit(pool, {webhook_id: 4})

    place = (await places(pool))[delivery_id]
    assert place.state == "ready"
    assert place.due_in == pytest.approx(60, abs=10)


async def test_inactive_config_is_admitted_after_reactivation(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, active=False)
    await enqueue_events(pool, 3)
    assert await queue.admit(pool, {webhook_id: 4}) == set()
    assert await states(pool) == ["parked"] * 3

    await pool.execute("UPDATE webhook_configs SET active = true, deactivation_reason = NULL")

    assert await queue.admit(pool, {webhook_id: 4}) == {webhook_id}
    assert await states(pool) == ["ready"] * 3


async def test_parked_delivery_missed_by_deletion_is_admitted(pool: Any) -> None:
    # An event accepted while its inactive config is deleted: the deletion does not see the row.
    webhook_id = await make_webhook_config(pool, active=False)
    async with pool.acquire() as connection, connection.transaction():
        await queue.enqueue(connection, [make_event()])
        await mark_deleted(pool, webhook_id)
        assert await queue.cancel_webhook(pool, webhook_id) == 0

    backlog = await queue.webhooks_with_backlog(pool)
    assert await queue.admit(pool, dict.fromkeys(backlog, 4)) == {webhook_id}

    [leftover] = await queue.claim(pool, 10, 30)
    assert leftover.webhook_deleted


async def test_only_the_named_configs_are_admitted(pool: Any) -> None:
    named = [await make_webhook_config(pool) for _ in range(2)]
    other = await make_webhook_config(pool)
    for webhook_id in (*named, other):
        for _ in range(3):
            await make_delivery(pool, webhook_id, state="parked")

    assert await queue.admit(pool, dict.fromkeys(named, 2)) == set(named)

    for webhook_id in named:
        assert await states(pool, webhook_id) == ["parked", "ready", "ready"]
    assert await states(pool, other) == ["parked"] * 3
    assert await queue.admit(pool, {}) == set()


async def test_concurrent_admissions_do_not_exceed_the_limit(pool: Any, webhook_id: UUID) -> None:
    for _ in range(10):
        await make_delivery(pool, webhook_id, state="parked")
    async with pool.acquire() as first, first.transaction():
        await queue.admit(first, {webhook_id: 4})
        assert await promptly(queue.admit(pool, {webhook_id: 4})) == set()

    assert Counter(await states(pool)) == {"ready": 4, "parked": 6}


async def test_backlog_lists_each_config_with_parked_deliveries_once(pool: Any) -> None:
    assert await queue.webhooks_with_backlog(pool) == []
    with_backlog = [await make_webhook_config(pool) for _ in range(3)]
    without = await make_webhook_config(pool)
    for webhook_id in with_backlog:
        for _ in range(2):
            await make_delivery(pool, webhook_id, state="parked")
    await make_delivery(pool, without)
    await make_delivery(pool, without, state="leased")

    assert await queue.webhooks_with_backlog(pool) == sorted(with_backlog)


@pytest.mark.parametrize(
    "columns",
    [
        {"state": "delivered"},
        {"state": "ready", "lease_id": new_id()},
        {"state": "leased", "lease_id": None},
        {"attempt_count": -1},
        {"reclaim_count": -1},
    ],
)
async def test_constraints_refuse_an_impossible_row(pool: Any, columns: dict[str, Any]) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await make_delivery(pool, new_id(), **columns)
