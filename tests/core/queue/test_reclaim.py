"""Reclaiming deliveries whose lease has ended."""

from typing import Any
from uuid import UUID

import pytest

from core import queue
from core.ids import format_id
from delivery.maintain import reclaim
from tests.support.factories import (
    attempts,
    end_leases,
    ids_of,
    lease_many,
    lease_one,
    make_delivery,
    places,
    promptly,
    settlement,
    states,
)


async def test_only_ended_leases_are_reclaimed(pool: Any, webhook_id: UUID) -> None:
    ended = await make_delivery(pool, webhook_id, state="leased", lease_in=-1)
    held = await make_delivery(pool, webhook_id, state="leased", lease_in=60)
    for state in ("ready", "parked"):
        await make_delivery(pool, webhook_id, state=state)

    assert await queue.reclaim(pool, 10) == [ended]

    found = await places(pool)
    assert (found[ended].state, found[ended].lease_id) == ("ready", None)
    assert found[held].state == "leased"
    assert await queue.reclaim(pool, 10) == []


async def test_first_reclaim_is_due_at_once_and_later_ones_back_off(
    pool: Any, webhook_id: UUID
) -> None:
    delivery = await lease_one(pool, webhook_id)
    waits = []
    for count in range(12):
        await end_leases(pool)
        assert await queue.reclaim(pool, 10) == [delivery.id]
        place = (await places(pool))[delivery.id]
        waits.append(place.due_in or 0)
        assert (place.state, place.attempt_count) == ("ready", 0)
        assert place.reclaim_count == count + 1
        await pool.execute("UPDATE delivery_queue SET due_at = now()")
        assert ids_of(await queue.claim(pool, 10, 60)) == {delivery.id}

    expected = [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 511, 511]
    assert waits == pytest.approx(expected, abs=0.5)
    assert await attempts(pool) == []


async def test_repeatedly_reclaimed_delivery_is_logged(
    pool: Any, logged: list[Any], webhook_id: UUID
) -> None:
    for count in (0, 1, 2):
        delivery_id = await make_delivery(
            pool, webhook_id, state="leased", lease_in=-1, reclaim_count=count
        )

    assert await reclaim(pool) == 3

    assert logged == [
        {
            "event": "delivery_ends_engines",
            "log_level": "warning",
            "delivery_id": format_id("dlv", delivery_id),
            "webhook_id": format_id("wh", webhook_id),
            "times": 3,
        }
    ]


async def test_reclaim_takes_the_longest_ended_leases_first(pool: Any, webhook_id: UUID) -> None:
    ended = [
        await make_delivery(pool, webhook_id, state="leased", lease_in=-ago) for ago in (1, 9, 5)
    ]

    assert set(await queue.reclaim(pool, 2)) == {ended[1], ended[2]}
    assert await queue.reclaim(pool, 2) == [ended[0]]


async def test_concurrent_reclaims_share_the_rows_without_waiting(
    pool: Any, webhook_id: UUID
) -> None:
    ended = {await make_delivery(pool, webhook_id, state="leased", lease_in=-1) for _ in range(4)}
    async with pool.acquire() as first, first.transaction():
        mine = await queue.reclaim(first, 2)
        theirs = await promptly(queue.reclaim(pool, 10))

    assert {*mine, *theirs} == ended
    assert len(mine) == len(theirs) == 2
    assert {place.reclaim_count for place in (await places(pool)).values()} == {1}


async def test_reclaim_skips_a_row_being_settled(pool: Any, webhook_id: UUID) -> None:
    [delivery] = await lease_many(pool, webhook_id, 1)
    await end_leases(pool)
    async with pool.acquire() as connection, connection.transaction():
        await queue.settle(connection, [settlement(delivery)], 10)
        assert await promptly(queue.reclaim(pool, 10)) == []

    assert await states(pool) == ["delivered"]


async def test_reclaim_works_at_the_maximum_count(pool: Any, webhook_id: UUID) -> None:
    most = 2**31 - 1
    delivery_id = await make_delivery(
        pool, webhook_id, state="leased", lease_in=-1, reclaim_count=most
    )

    assert await queue.reclaim(pool, 10) == [delivery_id]
