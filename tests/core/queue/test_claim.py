"""Claiming due deliveries and returning their leases."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from core import queue
from tests.support.factories import (
    EVENT_TYPE,
    attempts,
    end_leases,
    enqueue_events,
    ids_of,
    lease_one,
    make_delivery,
    make_webhook_config,
    mark_deleted,
    places,
    promptly,
    states,
)


async def test_claim_returns_all_data_of_an_attempt(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, version=7)
    [event] = await enqueue_events(pool, payload=b"\x00\x01")

    [claimed] = await queue.claim(pool, 10, 30)

    assert (claimed.webhook_id, claimed.webhook_version) == (webhook_id, 7)
    assert (claimed.webhook_active, claimed.webhook_deleted) == (True, False)
    assert (claimed.event_id, claimed.event_type) == (event.id, EVENT_TYPE)
    assert (claimed.payload, claimed.content_type) == (b"\x00\x01", "application/json")
    assert claimed.attempt_count == 0
    row = await pool.fetchrow("SELECT * FROM delivery_queue")
    assert (row["state"], row["lease_id"]) == ("leased", claimed.lease_id)
    assert (row["lease_until"] - claimed.claimed_at).total_seconds() == 30


async def test_claim_reports_deactivated_and_deleted_configs(pool: Any) -> None:
    paused = await make_webhook_config(pool, active=False)
    deleted = await make_webhook_config(pool)
    await mark_deleted(pool, deleted)
    for webhook_id in (paused, deleted):
        await make_delivery(pool, webhook_id)

    claimed = {d.webhook_id: d for d in await queue.claim(pool, 10, 30)}

    assert (claimed[paused].webhook_active, claimed[paused].webhook_deleted) == (False, False)
    assert claimed[deleted].webhook_deleted


async def test_longest_due_deliveries_are_claimed_first(pool: Any, webhook_id: UUID) -> None:
    due = {ago: await make_delivery(pool, webhook_id, due_in=-ago) for ago in (5, 60, 1, 30)}

    assert ids_of(await queue.claim(pool, 2, 30)) == {due[60], due[30]}
    assert ids_of(await queue.claim(pool, 2, 30)) == {due[5], due[1]}


async def test_delivery_is_not_claimed_before_it_is_due(pool: Any, webhook_id: UUID) -> None:
    delivery_id = await make_delivery(pool, webhook_id, due_in=60)
    assert await queue.claim(pool, 10, 30) == []

    await pool.execute("UPDATE delivery_queue SET due_at = now()")

    assert ids_of(await queue.claim(pool, 10, 30)) == {delivery_id}


@pytest.mark.parametrize("state", ["parked", "leased"])
async def test_parked_and_leased_deliveries_are_not_claimed(
    pool: Any, state: str, webhook_id: UUID
) -> None:
    await make_delivery(pool, webhook_id, state=state, due_in=-60)

    assert await queue.claim(pool, 10, 30) == []


async def test_claim_takes_at_most_its_limit(pool: Any, webhook_id: UUID) -> None:
    for _ in range(5):
        await make_delivery(pool, webhook_id)

    assert [len(await queue.claim(pool, 2, 30)) for _ in range(4)] == [2, 2, 1, 0]


async def test_claim_skips_rows_locked_by_another_claim(pool: Any, webhook_id: UUID) -> None:
    deliveries = {await make_delivery(pool, webhook_id) for _ in range(6)}
    async with pool.acquire() as first, first.transaction():
        mine = ids_of(await queue.claim(first, 3, 30))
        theirs = ids_of(await promptly(queue.claim(pool, 10, 30)))

    assert len(mine) == len(theirs) == 3
    assert mine | theirs == deliveries


async def test_concurrent_claims_share_no_row_and_leave_none(pool: Any, webhook_id: UUID) -> None:
    for _ in range(10):
        await enqueue_events(pool, 20)

    batches = await asyncio.gather(*(queue.claim(pool, 30, 30) for _ in range(8)))

    claimed = [delivery for batch in batches for delivery in batch]
    assert len(claimed) == len(ids_of(claimed)) >= 30
    rest = await queue.claim(pool, 200, 30)
    assert len(claimed) + len(rest) == 200
    assert await states(pool, webhook_id) == ["leased"] * 200


@pytest.mark.parametrize("created_at", ["infinity", "-infinity", "20000-01-01", "4000-01-01 BC"])
async def test_claim_survives_an_unreadable_timestamp(
    pool: Any, created_at: str, webhook_id: UUID
) -> None:
    odd, sound = [await make_delivery(pool, webhook_id) for _ in range(2)]
    await pool.execute(
        f"UPDATE delivery_queue SET created_at = '{created_at}' WHERE id = $1",  # noqa: S608
        odd,
    )

    claimed = await queue.claim(pool, 10, 60)

    assert ids_of(claimed) == {odd, sound}
    # The delivery delay is measured from this time.
    assert all(d.claimed_at - d.due_since >= timedelta(0) for d in claimed)


@pytest.mark.parametrize(("give_up", "state"), [("release", "ready"), ("park_leased", "parked")])
async def test_returned_lease_costs_no_attempt_and_no_reclaim(
    pool: Any, give_up: str, state: str, webhook_id: UUID
) -> None:
    delivery = await lease_one(pool, webhook_id, attempt_count=2, reclaim_count=1)

    await getattr(queue, give_up)(pool, [delivery])

    place = (await places(pool))[delivery.id]
    assert (place.state, place.attempt_count, place.reclaim_count) == (state, 2, 1)
    assert place.due_in is not None
    assert place.due_in <= 0
    assert await attempts(pool) == []


@pytest.mark.parametrize("give_up", ["release", "park_leased"])
async def test_lost_lease_cannot_be_returned(pool: Any, give_up: str, webhook_id: UUID) -> None:
    old = await lease_one(pool, webhook_id)
    await end_leases(pool)
    await queue.reclaim(pool, 10)
    [new] = await queue.claim(pool, 10, 60)

    await getattr(queue, give_up)(pool, [old])

    place = (await places(pool))[old.id]
    assert (place.state, place.lease_id) == ("leased", new.lease_id)


async def test_notify_reaches_listeners(pool: Any) -> None:
    heard = asyncio.Event()
    async with pool.acquire() as listener:
        await listener.add_listener(queue.CHANNEL, lambda *_: heard.set())
        await queue.notify(pool)
        async with asyncio.timeout(10):
            await heard.wait()
        await listener.reset()
