"""Accepting events: matching configs and idempotency keys."""

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID

import pytest

from core import queue
from tests.support.factories import (
    EVENT_TYPE,
    enqueue_events,
    make_event,
    make_webhook_config,
    mark_deleted,
    states,
    until_blocked,
)


async def test_event_gets_a_ready_delivery_per_matching_config(pool: Any) -> None:
    first, second = [await make_webhook_config(pool) for _ in range(2)]
    both_types = await make_webhook_config(pool, events=["refund.failed", EVENT_TYPE])
    event = make_event()

    accepted = await queue.enqueue(pool, [event])

    assert accepted.delivery_counts == [3]
    rows = await pool.fetch("SELECT * FROM delivery_queue")
    assert {row["webhook_id"] for row in rows} == {first, second, both_types}
    for row in rows:
        assert (row["event_id"], row["merchant_id"]) == (event.id, event.merchant_id)
        assert (row["event_type"], row["state"]) == (EVENT_TYPE, "ready")
        assert (row["attempt_count"], row["reclaim_count"]) == (0, 0)
        assert row["id"].version == 7


async def test_only_configs_of_merchant_and_type_match(pool: Any) -> None:
    await make_webhook_config(pool, merchant_id="m_2")
    await make_webhook_config(pool, events=["refund.failed"])
    wanted = await make_webhook_config(pool)

    await enqueue_events(pool)

    assert await pool.fetchval("SELECT array_agg(webhook_id) FROM delivery_queue") == [wanted]


async def test_delivery_to_an_inactive_config_is_parked(pool: Any) -> None:
    inactive = await make_webhook_config(pool, active=False)
    active = await make_webhook_config(pool)

    await enqueue_events(pool)

    assert await states(pool, inactive) == ["parked"]
    assert await states(pool, active) == ["ready"]


async def test_deleted_config_gets_no_delivery(pool: Any, webhook_id: UUID) -> None:
    await mark_deleted(pool, webhook_id)
    event = make_event()

    accepted = await queue.enqueue(pool, [event])

    assert accepted.delivery_counts == [0]
    assert await states(pool) == []


async def test_event_without_matching_config_is_stored(pool: Any) -> None:
    event = make_event(payload=b"\x00\xff raw bytes", content_type="application/octet-stream")

    accepted = await queue.enqueue(pool, [event])

    stored = await pool.fetchrow("SELECT * FROM events")
    assert (stored["id"], stored["payload"]) == (event.id, b"\x00\xff raw bytes")
    assert (stored["content_type"], stored["delivery_count"]) == ("application/octet-stream", 0)
    assert accepted == (stored["created_at"], [0])


async def test_batch_may_mix_merchants_types_and_unmatched_events(pool: Any) -> None:
    await make_webhook_config(pool)
    await make_webhook_config(pool, merchant_id="m_2")
    await make_webhook_config(pool, merchant_id="m_2")
    one, two, none = make_event(), make_event(merchant_id="m_2"), make_event(type="payout.paid")

    accepted = await queue.enqueue(pool, [one, two, none])

    assert accepted.delivery_counts == [1, 2, 0]
    assert await states(pool) == ["ready"] * 3


@pytest.mark.parametrize("newest_first", [False, True])
async def test_first_position_wins_a_repeated_key_regardless_of_ids(
    pool: Any, webhook_id: UUID, newest_first: bool
) -> None:
    events = [make_event(idempotency_key="k") for _ in range(2)]
    if newest_first:
        events.reverse()

    accepted = await queue.enqueue(pool, events)

    assert accepted.delivery_counts == [1, None]
    assert await pool.fetchval("SELECT array_agg(id) FROM events") == [events[0].id]
    assert await states(pool) == ["ready"]


async def test_used_key_makes_no_second_event(pool: Any) -> None:
    await make_webhook_config(pool)
    first, again, other = (
        make_event(idempotency_key="k"),
        make_event(idempotency_key="k"),
        make_event(idempotency_key="another"),
    )
    await queue.enqueue(pool, [first])

    accepted = await queue.enqueue(pool, [again, other])

    assert accepted.delivery_counts == [None, 1]
    assert set(await _column(pool, "SELECT id FROM events")) == {first.id, other.id}
    keys = await pool.fetch("SELECT key, event_id FROM idempotency_keys ORDER BY key")
    assert [tuple(row) for row in keys] == [("another", other.id), ("k", first.id)]


async def test_merchants_do_not_share_keys(pool: Any) -> None:
    events = [make_event(idempotency_key="k", merchant_id=m) for m in ("m_1", "m_2")]

    assert (await queue.enqueue(pool, events)).delivery_counts == [0, 0]


async def test_events_without_a_key_are_never_duplicates(pool: Any) -> None:
    accepted = await queue.enqueue(pool, [make_event(), make_event()])

    assert accepted.delivery_counts == [0, 0]
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 0


async def test_key_of_a_rolled_back_batch_is_free(pool: Any) -> None:
    event = make_event(idempotency_key="k")
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await queue.enqueue(connection, [make_event(idempotency_key="k")])
        await transaction.rollback()

    assert (await queue.enqueue(pool, [event])).delivery_counts == [0]


async def test_batches_sharing_idempotency_keys_never_deadlock(pool: Any) -> None:
    await make_webhook_config(pool)
    keys = [f"k{number:02}" for number in range(50)]
    forward = [make_event(idempotency_key=key) for key in keys]
    backward = [make_event(idempotency_key=key) for key in reversed(keys)]

    batches = (forward, backward) * 4
    results = await asyncio.gather(*(queue.enqueue(pool, batch) for batch in batches))

    accepted = Counter(
        event.id
        for batch, result in zip(batches, results, strict=True)
        for event, count in zip(batch, result.delivery_counts, strict=True)
        if count is not None
    )
    assert sum(accepted.values()) == len(keys)
    assert set(await _column(pool, "SELECT event_id FROM idempotency_keys")) == set(accepted)
    assert await states(pool) == ["ready"] * len(keys)


async def test_idempotency_keys_are_locked_in_one_order(pool: Any) -> None:
    # A third session holds the key in the middle: both batches stop there, having taken all that
    # sorts before it and nothing that sorts after. In any other order they would hold each other's.
    keys = ["a", "m", "z"]
    async with pool.acquire() as holder:
        transaction = holder.transaction()
        await transaction.start()
        await queue.enqueue(holder, [make_event(idempotency_key="m")])
        batches = [
            asyncio.create_task(queue.enqueue(pool, [make_event(idempotency_key=k) for k in order]))
            for order in (keys, keys[::-1])
        ]
        await until_blocked(pool, 2)
        await transaction.rollback()

    results = await asyncio.gather(*batches)
    refused = sorted(result.delivery_counts.count(None) for result in results)
    assert refused == [0, 3]


async def _column(pool: Any, query: str) -> list[Any]:
    return [row[0] for row in await pool.fetch(query)]
