"""The queue's statements against a real PostgreSQL: the way in, leases, backlogs, and the way back.

test_queue_settle.py has the results of attempts; test_queue_model.py mixes everything at random.
"""

import asyncio
import sys
from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from core import queue
from core.ids import format_id, new_id
from delivery.maintain import reclaim
from tests.support.factories import (
    EVENT_TYPE,
    attempts,
    enqueue_events,
    ids_of,
    lease_many,
    lease_one,
    make_delivery,
    make_event,
    make_webhook_config,
    places,
    promptly,
    settle,
    settlement,
    states,
    until_blocked,
)

# --- enqueue


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


async def test_deleted_config_gets_no_delivery(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    await _delete(pool, webhook_id)
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


async def test_repeated_key_in_a_batch_makes_one_event(pool: Any) -> None:
    await make_webhook_config(pool)
    first, second = [make_event(idempotency_key="k") for _ in range(2)]

    accepted = await queue.enqueue(pool, [first, second])

    assert accepted.delivery_counts == [1, None]
    assert await pool.fetchval("SELECT array_agg(id) FROM events") == [first.id]
    assert await states(pool) == ["ready"]


async def test_first_position_wins_a_repeated_key_regardless_of_ids(pool: Any) -> None:
    older, newer = [make_event(idempotency_key="k") for _ in range(2)]

    accepted = await queue.enqueue(pool, [newer, older])

    assert accepted.delivery_counts == [0, None]
    assert await pool.fetchval("SELECT array_agg(id) FROM events") == [newer.id]


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


# --- claim


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
    await _delete(pool, deleted)
    for webhook_id in (paused, deleted):
        await make_delivery(pool, webhook_id)

    claimed = {d.webhook_id: d for d in await queue.claim(pool, 10, 30)}

    assert (claimed[paused].webhook_active, claimed[paused].webhook_deleted) == (False, False)
    assert claimed[deleted].webhook_deleted


async def test_longest_due_deliveries_are_claimed_first(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    due = {ago: await make_delivery(pool, webhook_id, due_in=-ago) for ago in (5, 60, 1, 30)}

    assert ids_of(await queue.claim(pool, 2, 30)) == {due[60], due[30]}
    assert ids_of(await queue.claim(pool, 2, 30)) == {due[5], due[1]}


async def test_delivery_is_not_claimed_before_it_is_due(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery_id = await make_delivery(pool, webhook_id, due_in=60)
    assert await queue.claim(pool, 10, 30) == []

    await pool.execute("UPDATE delivery_queue SET due_at = now()")

    assert ids_of(await queue.claim(pool, 10, 30)) == {delivery_id}


@pytest.mark.parametrize("state", ["parked", "leased"])
async def test_parked_and_leased_deliveries_are_not_claimed(pool: Any, state: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_delivery(pool, webhook_id, state=state, due_in=-60)

    assert await queue.claim(pool, 10, 30) == []


async def test_claim_takes_at_most_its_limit(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(5):
        await make_delivery(pool, webhook_id)

    assert [len(await queue.claim(pool, 2, 30)) for _ in range(4)] == [2, 2, 1, 0]


async def test_claim_skips_rows_locked_by_another_claim(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    deliveries = {await make_delivery(pool, webhook_id) for _ in range(6)}
    async with pool.acquire() as first, first.transaction():
        mine = ids_of(await queue.claim(first, 3, 30))
        theirs = ids_of(await promptly(queue.claim(pool, 10, 30)))

    assert len(mine) == len(theirs) == 3
    assert mine | theirs == deliveries


async def test_concurrent_claims_share_no_row_and_leave_none(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(10):
        await enqueue_events(pool, 20)

    batches = await asyncio.gather(*(queue.claim(pool, 30, 30) for _ in range(8)))

    claimed = [delivery for batch in batches for delivery in batch]
    assert len(claimed) == len(ids_of(claimed)) >= 30
    rest = await queue.claim(pool, 200, 30)
    assert len(claimed) + len(rest) == 200
    assert await states(pool, webhook_id) == ["leased"] * 200


# --- park, release, cancel


async def test_park_webhooks_moves_all_ready_deliveries(pool: Any) -> None:
    webhook_id, other = [await make_webhook_config(pool) for _ in range(2)]
    for state in ("ready", "leased", "parked"):
        await make_delivery(pool, webhook_id, state=state)
    await make_delivery(pool, webhook_id, due_in=60)
    await make_delivery(pool, other)

    await queue.park_webhooks(pool, [webhook_id])

    assert await states(pool, webhook_id) == ["leased", "parked", "parked", "parked"]
    assert await states(pool, other) == ["ready"]


async def test_park_due_moves_only_due_deliveries(pool: Any) -> None:
    webhook_id, other = [await make_webhook_config(pool) for _ in range(2)]
    for state in ("ready", "ready", "leased", "parked"):
        await make_delivery(pool, webhook_id, state=state)
    await make_delivery(pool, webhook_id, due_in=60)
    await make_delivery(pool, other)

    await queue.park_due(pool, [webhook_id])

    assert await states(pool, webhook_id) == ["leased", "parked", "parked", "parked", "ready"]
    assert await states(pool, other) == ["ready"]


@pytest.mark.parametrize(("give_up", "state"), [("release", "ready"), ("park_leased", "parked")])
async def test_returned_lease_costs_no_attempt_and_no_reclaim(
    pool: Any, give_up: str, state: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id, attempt_count=2, reclaim_count=1)

    await getattr(queue, give_up)(pool, [delivery])

    place = (await places(pool))[delivery.id]
    assert (place.state, place.attempt_count, place.reclaim_count) == (state, 2, 1)
    assert place.due_in is not None
    assert place.due_in <= 0
    assert await attempts(pool) == []


@pytest.mark.parametrize("give_up", ["release", "park_leased"])
async def test_lost_lease_cannot_be_returned(pool: Any, give_up: str) -> None:
    webhook_id = await make_webhook_config(pool)
    old = await lease_one(pool, webhook_id)
    await _expire(pool)
    await queue.reclaim(pool, 10)
    [new] = await queue.claim(pool, 10, 60)

    await getattr(queue, give_up)(pool, [old])

    place = (await places(pool))[old.id]
    assert (place.state, place.lease_id) == ("leased", new.lease_id)


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


async def test_delivery_cancelled_in_flight_stays_cancelled(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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
        await _delete(connection, webhook_id)
        settling = asyncio.create_task(settle(pool, settlement(delivery)))
        await until_blocked(pool)
        assert await promptly(queue.cancel_webhook(connection, webhook_id)) == 1

    assert (await settling).delivery_ids == {delivery.id}
    found = await places(pool)
    assert (found[delivery.id].state, found[waiting].state) == ("delivered", "cancelled")


# --- admit


async def test_backlog_is_admitted_oldest_first_up_to_the_limit(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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


async def test_future_retries_take_no_slots(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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


async def test_parked_retry_keeps_its_backoff(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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
        await _delete(pool, webhook_id)
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


async def test_concurrent_admissions_do_not_exceed_the_limit(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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


# --- reclaim


async def test_only_ended_leases_are_reclaimed(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    ended = await make_delivery(pool, webhook_id, state="leased", lease_in=-1)
    held = await make_delivery(pool, webhook_id, state="leased", lease_in=60)
    for state in ("ready", "parked"):
        await make_delivery(pool, webhook_id, state=state)

    assert await queue.reclaim(pool, 10) == [ended]

    found = await places(pool)
    assert (found[ended].state, found[ended].lease_id) == ("ready", None)
    assert found[held].state == "leased"
    assert await queue.reclaim(pool, 10) == []


async def test_first_reclaim_is_due_at_once_and_later_ones_back_off(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)
    waits = []
    for count in range(12):
        await _expire(pool)
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


async def test_repeatedly_reclaimed_delivery_is_logged(pool: Any, logged: list[Any]) -> None:
    webhook_id = await make_webhook_config(pool)
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


async def test_reclaim_takes_the_longest_ended_leases_first(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    ended = [
        await make_delivery(pool, webhook_id, state="leased", lease_in=-ago) for ago in (1, 9, 5)
    ]

    assert set(await queue.reclaim(pool, 2)) == {ended[1], ended[2]}
    assert await queue.reclaim(pool, 2) == [ended[0]]


async def test_concurrent_reclaims_share_the_rows_without_waiting(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    ended = {await make_delivery(pool, webhook_id, state="leased", lease_in=-1) for _ in range(4)}
    async with pool.acquire() as first, first.transaction():
        mine = await queue.reclaim(first, 2)
        theirs = await promptly(queue.reclaim(pool, 10))

    assert {*mine, *theirs} == ended
    assert len(mine) == len(theirs) == 2
    assert {place.reclaim_count for place in (await places(pool)).values()} == {1}


async def test_reclaim_skips_a_row_being_settled(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    [delivery] = await lease_many(pool, webhook_id, 1)
    await _expire(pool)
    async with pool.acquire() as connection, connection.transaction():
        await queue.settle(connection, [settlement(delivery)], 10)
        assert await promptly(queue.reclaim(pool, 10)) == []

    assert await states(pool) == ["delivered"]


# --- the hint


async def test_notify_reaches_listeners(pool: Any) -> None:
    heard = asyncio.Event()
    async with pool.acquire() as listener:
        await listener.add_listener(queue.CHANNEL, lambda *_: heard.set())
        await queue.notify(pool)
        async with asyncio.timeout(10):
            await heard.wait()
        await listener.reset()


@pytest.mark.parametrize("created_at", ["infinity", "-infinity", "20000-01-01", "4000-01-01 BC"])
async def test_claim_survives_an_unreadable_timestamp(pool: Any, created_at: str) -> None:
    webhook_id = await make_webhook_config(pool)
    odd, sound = [await make_delivery(pool, webhook_id) for _ in range(2)]
    await pool.execute(
        f"UPDATE delivery_queue SET created_at = '{created_at}' WHERE id = $1",  # noqa: S608
        odd,
    )

    claimed = await queue.claim(pool, 10, 60)

    assert ids_of(claimed) == {odd, sound}
    # What is owed since then is reckoned by it.
    assert all(d.claimed_at - d.due_since >= timedelta(0) for d in claimed)


async def test_reclaim_works_at_the_maximum_count(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    most = 2**31 - 1
    delivery_id = await make_delivery(
        pool, webhook_id, state="leased", lease_in=-1, reclaim_count=most
    )

    assert await queue.reclaim(pool, 10) == [delivery_id]


# --- the table's own rules


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


async def _delete(connection: Any, webhook_id: UUID) -> None:
    await connection.execute(
        "UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", webhook_id
    )


async def _expire(pool: Any) -> None:
    await pool.execute(
        "UPDATE delivery_queue SET lease_until = now() - interval '1 second' WHERE state = 'leased'"
    )


async def _column(pool: Any, query: str) -> list[Any]:
    return [row[0] for row in await pool.fetch(query)]
