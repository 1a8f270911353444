"""Chains: one delivery per key and config at a time, in the order of the commits."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from core import queue
from core.ids import new_id
from core.lifecycle import DeliveryState
from core.queue import Chain, LeasedDelivery, NewEvent
from core.queue.ordering import _lock
from delivery import maintain
from tests.support.factories import (
    MERCHANT,
    end_leases,
    enqueue_events,
    failed,
    make_delivery,
    make_event,
    make_webhook_config,
    promptly,
    rescheduled,
    settle,
    settlement,
    states,
    until_blocked,
)

_OPEN = """
SELECT q.webhook_id, q.event_id, q.state, q.ordering_key, q.ordering_position, q.due_at,
    q.due_at <= now() AS due
FROM delivery_queue q ORDER BY q.webhook_id, q.ordering_key, q.ordering_position
"""


async def accept(pool: Any, *keys: str | None, **overrides: Any) -> list[NewEvent]:
    """Accept one batch with an event per ordering key."""
    events = [make_event(ordering_key=key, **overrides) for key in keys]
    accepted = await queue.enqueue_in_order(pool, events)
    assert None not in accepted.delivery_counts
    return events


async def chain(pool: Any, webhook_id: UUID, key: str = "k") -> list[tuple[UUID, str]]:
    """(event, state) of the open deliveries of a key and config, in order."""
    return [
        (row["event_id"], row["state"])
        for row in await pool.fetch(_OPEN)
        if (row["webhook_id"], row["ordering_key"]) == (webhook_id, key)
    ]


async def finish_first(pool: Any, final: str = "delivered") -> LeasedDelivery:
    """Claim the only due delivery, finish it and promote the next in its chain."""
    [lease] = await queue.claim(pool, 10, 60)
    ended = settlement(lease) if final == "delivered" else failed(lease)
    settled = await settle(pool, ended)
    await queue.promote(pool, settled.ended_chains)
    return lease


@asynccontextmanager
async def idempotency_key_in_use(pool: Any, key: str) -> AsyncIterator[None]:
    """Another transaction holds the key, so that a statement that accepts it waits."""
    async with pool.acquire() as other:
        holding = other.transaction()
        await holding.start()
        await other.execute(
            "INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id) "
            "VALUES ($1, $2, '', new_uuid7())",
            MERCHANT,
            key,
        )
        yield
        await holding.rollback()


# --- acceptance


async def test_first_of_a_key_is_ready_and_the_others_blocked(pool: Any, ordered_id: UUID) -> None:
    events = await accept(pool, "k", "other", "k", None, "k")

    rows = {row["event_id"]: row for row in await pool.fetch(_OPEN)}
    assert [rows[e.id]["state"] for e in events] == [
        "ready",
        "ready",
        "blocked",
        "ready",
        "blocked",
    ]
    assert [rows[e.id]["ordering_key"] for e in events] == ["k", "other", "k", None, "k"]
    assert [rows[e.id]["ordering_position"] for e in events] == [1, 1, 2, None, 3]
    assert [rows[e.id]["due"] for e in events] == [True, True, False, True, False]
    keys = await pool.fetch("SELECT id, ordering_key FROM events")
    assert {row["id"]: row["ordering_key"] for row in keys} == {
        e.id: e.ordering_key for e in events
    }

    later = await accept(pool, "k")
    in_order = [events[0], events[2], events[4], *later]
    assert [event_id for event_id, _ in await chain(pool, ordered_id)] == [e.id for e in in_order]


async def test_unordered_config_blocks_nothing(pool: Any) -> None:
    ordered = await make_webhook_config(pool, ordered=True)
    unordered = await make_webhook_config(pool)
    await accept(pool, "k", "k")

    assert await states(pool, ordered) == ["blocked", "ready"]
    assert await states(pool, unordered) == ["ready", "ready"]
    keys = await pool.fetch(
        "SELECT ordering_key, ordering_position FROM delivery_queue WHERE webhook_id = $1",
        unordered,
    )
    assert [tuple(row) for row in keys] == [(None, None)] * 2


async def test_each_merchant_and_config_has_a_separate_order(pool: Any) -> None:
    configs = [await make_webhook_config(pool, ordered=True) for _ in range(2)]
    theirs = await make_webhook_config(pool, ordered=True, merchant_id="m_2")
    await accept(pool, "k")
    await accept(pool, "k", merchant_id="m_2")

    assert [await states(pool, w) for w in (*configs, theirs)] == [["ready"]] * 3


async def test_first_in_chain_of_an_inactive_config_is_parked(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, ordered=True, active=False)
    first, second = await accept(pool, "k", "k")

    assert await chain(pool, webhook_id) == [(first.id, "parked"), (second.id, "blocked")]


async def test_duplicate_event_takes_no_position(pool: Any, ordered_id: UUID) -> None:
    [event] = await accept(pool, "k", idempotency_key="once")
    again = make_event(ordering_key="k", idempotency_key="once")

    accepted = await queue.enqueue_in_order(pool, [again])

    assert accepted.delivery_counts == [None]
    assert await chain(pool, ordered_id) == [(event.id, "ready")]


# --- promotion


@pytest.mark.parametrize("final", ["delivered", "failed"])
async def test_end_of_a_delivery_promotes_the_next(pool: Any, final: str, ordered_id: UUID) -> None:
    events = await accept(pool, "k", "k", "k")
    for event in events:
        lease = await finish_first(pool, final)
        assert lease.event_id == event.id
    assert await states(pool, ordered_id) == [final] * 3

    [later] = await accept(pool, "k")
    assert await chain(pool, ordered_id) == [(later.id, "ready")]


async def test_retry_blocks_its_own_chain_only(pool: Any, ordered_id: UUID) -> None:
    first, second, other = await accept(pool, "k", "k", "other")
    leases = {lease.event_id: lease for lease in await queue.claim(pool, 10, 60)}
    assert leases.keys() == {first.id, other.id}
    settled = await settle(pool, rescheduled(leases[first.id]), settlement(leases[other.id]))

    assert settled.ended_chains == (Chain(ordered_id, "other"),)
    await queue.promote(pool, [Chain(ordered_id, "k"), Chain(ordered_id, "other")])
    assert await chain(pool, ordered_id) == [(first.id, "ready"), (second.id, "blocked")]
    assert await queue.claim(pool, 10, 60) == []


async def test_settle_with_a_lost_lease_ends_no_chain(pool: Any) -> None:
    await make_webhook_config(pool, ordered=True)
    await accept(pool, "k", "k")
    [lease] = await queue.claim(pool, 10, 60)
    await pool.execute("UPDATE delivery_queue SET lease_id = $1 WHERE id = $2", new_id(), lease.id)

    assert (await settle(pool, settlement(lease))).ended_chains == ()


@pytest.mark.parametrize("give_up", [queue.release, queue.park_leased, None])
async def test_unsent_first_delivery_stays_first(pool: Any, give_up: Any, ordered_id: UUID) -> None:
    first, second = await accept(pool, "k", "k")
    leased = await queue.claim(pool, 10, 60)
    if give_up:
        await give_up(pool, leased)
    else:
        await end_leases(pool)
        assert len(await queue.reclaim(pool, 10)) == 1
    await queue.promote(pool, [Chain(ordered_id, "k")])

    [(event_id, state), waiting] = await chain(pool, ordered_id)
    assert (event_id, waiting) == (first.id, (second.id, "blocked"))
    assert state == ("parked" if give_up is queue.park_leased else "ready")


async def test_next_in_chain_is_parked_until_reactivation(pool: Any, ordered_id: UUID) -> None:
    _, second, third = await accept(pool, "k", "k", "k")
    [lease] = await queue.claim(pool, 10, 60)
    settled = await settle(pool, failed(lease), limit=1)
    assert settled.deactivated == {ordered_id: "failures"}
    await queue.promote(pool, settled.ended_chains)

    assert await chain(pool, ordered_id) == [(second.id, "parked"), (third.id, "blocked")]
    assert await queue.admit(pool, {ordered_id: 32}) == set()
    await pool.execute("UPDATE webhook_configs SET active = true, deactivation_reason = NULL")
    assert await queue.admit(pool, {ordered_id: 32}) == {ordered_id}
    assert [(await finish_first(pool)).event_id for _ in range(2)] == [second.id, third.id]


async def test_pause_parks_only_the_first_in_chain(pool: Any, ordered_id: UUID) -> None:
    first, second = await accept(pool, "k", "k")
    await queue.park_webhooks(pool, [ordered_id])

    assert await chain(pool, ordered_id) == [(first.id, "parked"), (second.id, "blocked")]


async def test_blocked_deliveries_take_no_slots(pool: Any, ordered_id: UUID) -> None:
    await accept(pool, *["k"] * 40)
    parked = [await make_delivery(pool, ordered_id, state="parked") for _ in range(3)]

    assert await queue.admit(pool, {ordered_id: 8}) == {ordered_id}
    ready = {lease.id for lease in await queue.claim(pool, 100, 60)}
    assert len(ready) == 4
    assert ready > set(parked)


async def test_delivery_time_applies_in_its_turn_and_blocks_the_chain(
    pool: Any, ordered_id: UUID
) -> None:
    tomorrow = await pool.fetchval("SELECT now() + interval '1 day'")
    await accept(pool, "k")
    [timed] = await accept(pool, "k", not_before=tomorrow)
    [behind] = await accept(pool, "k")
    await finish_first(pool)

    assert await chain(pool, ordered_id) == [(timed.id, "ready"), (behind.id, "blocked")]
    due = await pool.fetchval("SELECT due_at FROM delivery_queue WHERE state = 'ready'")
    assert due == tomorrow


async def test_redelivery_is_outside_the_order(pool: Any, ordered_id: UUID) -> None:
    _, second = await accept(pool, "k", "k")
    delivered = await finish_first(pool)
    again = await queue.redeliver(pool, MERCHANT, delivered.id)

    leases = await queue.claim(pool, 10, 60)
    assert {lease.event_id for lease in leases} == {delivered.event_id, second.id}
    [of_redelivery] = [lease for lease in leases if lease.id == again]
    assert (await settle(pool, settlement(of_redelivery))).ended_chains == ()
    assert await chain(pool, ordered_id) == [(second.id, "leased")]


async def test_cancel_webhook_includes_blocked_deliveries(pool: Any, ordered_id: UUID) -> None:
    await accept(pool, "k", "k", "k", "other")
    await queue.claim(pool, 1, 60)
    await pool.execute("UPDATE webhook_configs SET deleted_at = now()")

    assert await queue.cancel_webhook(pool, ordered_id) == 4
    assert await states(pool) == ["cancelled"] * 4


async def test_queued_deliveries_keep_their_order_on_config_change(
    pool: Any, webhook_id: UUID
) -> None:
    [before] = await accept(pool, "k")
    await pool.execute("UPDATE webhook_configs SET ordered = true")
    first, second = await accept(pool, "k", "k")
    await pool.execute("UPDATE webhook_configs SET ordered = false")
    [beside] = await accept(pool, "k")
    await pool.execute("UPDATE webhook_configs SET ordered = true")
    [third] = await accept(pool, "k")

    in_order = [first, second, third]
    assert [event_id for event_id, _ in await chain(pool, webhook_id)] == [e.id for e in in_order]
    leases = {lease.event_id: lease for lease in await queue.claim(pool, 10, 60)}
    assert leases.keys() == {before.id, beside.id, first.id}
    settled = await settle(pool, *(settlement(lease) for lease in leases.values()))
    await queue.promote(pool, settled.ended_chains)
    assert [(await finish_first(pool)).event_id for _ in range(2)] == [second.id, third.id]


# --- concurrency


async def test_publishers_of_one_key_commit_in_sequence(pool: Any, ordered_id: UUID) -> None:
    async with idempotency_key_in_use(pool, "taken"):
        first = asyncio.create_task(accept(pool, "k", idempotency_key="taken"))
        await until_blocked(pool)
        second = asyncio.create_task(accept(pool, "k"))
        await until_blocked(pool, 2)
        # Events with another key or without a key do not wait.
        assert _lock(make_event(ordering_key="k")) != _lock(make_event(ordering_key="other"))
        await promptly(accept(pool, "other", None))
        await promptly(enqueue_events(pool))
    [one], [two] = await first, await second

    assert await chain(pool, ordered_id) == [(one.id, "ready"), (two.id, "blocked")]


async def test_order_holds_under_repeatable_read_default(
    pool: Any, database_url: str, ordered_id: UUID
) -> None:
    setting = {"default_transaction_isolation": "repeatable read"}
    async with asyncpg.create_pool(database_url, server_settings=setting) as strict:
        async with idempotency_key_in_use(pool, "taken"):
            first = asyncio.create_task(accept(strict, "k", idempotency_key="taken"))
            await until_blocked(pool)
            second = asyncio.create_task(accept(strict, "k"))
            await until_blocked(pool, 2)
        [one], [two] = await first, await second

    assert await chain(pool, ordered_id) == [(one.id, "ready"), (two.id, "blocked")]


def test_ordering_key_lock_is_stable_across_releases() -> None:
    """Two releases may run at once, and with different locks both would assign one position."""
    assert _lock(make_event(ordering_key="k")) == 3170
    assert _lock(make_event(ordering_key="k", merchant_id="m_2")) == 571


async def test_batches_sharing_ordering_keys_never_deadlock(pool: Any, ordered_id: UUID) -> None:
    keys = [f"k{n}" for n in range(20)]
    batches: list[Sequence[str]] = [keys, keys[::-1], keys[10:] + keys[:10]] * 10
    async with asyncio.timeout(30):
        await asyncio.gather(*(accept(pool, *batch) for batch in batches))

    for key in keys:
        found = await chain(pool, ordered_id, key)
        assert [state for _, state in found] == ["ready"] + ["blocked"] * (len(batches) - 1)


async def test_event_accepted_while_the_first_ends_is_ready(pool: Any, ordered_id: UUID) -> None:
    await accept(pool, "k")
    async with idempotency_key_in_use(pool, "taken"):
        accepting = asyncio.create_task(accept(pool, "k", idempotency_key="taken"))
        await until_blocked(pool)
        await promptly(finish_first(pool))
        assert await chain(pool, ordered_id) == []
    [event] = await accepting

    assert await chain(pool, ordered_id) == [(event.id, "ready")]


async def test_settle_promotes_event_accepted_before_its_commit(
    pool: Any, ordered_id: UUID
) -> None:
    await accept(pool, "k")
    [lease] = await queue.claim(pool, 10, 60)
    async with pool.acquire() as connection:
        async with connection.transaction():
            settled = await queue.settle(connection, [settlement(lease)], 10)
            [event] = await promptly(accept(pool, "k"))
        assert await chain(pool, ordered_id) == [(event.id, "blocked")]
    await queue.promote(pool, settled.ended_chains)

    assert await chain(pool, ordered_id) == [(event.id, "ready")]


async def test_concurrent_accept_and_settle_strand_no_chain(pool: Any, ordered_id: UUID) -> None:
    """Accept and settle at the same time, 60 times."""
    await accept(pool, *(f"k{n}" for n in range(8)))
    for _ in range(60):
        leases = await queue.claim(pool, 100, 60)
        assert len(leases) == 8

        async def end(lease: LeasedDelivery) -> None:
            settled = await settle(pool, settlement(lease))
            await queue.promote(pool, settled.ended_chains)

        accepting = [accept(pool, f"k{n}") for n in range(8)]
        await asyncio.gather(*accepting, *map(end, leases))
        for n in range(8):
            assert [state for _, state in await chain(pool, ordered_id, f"k{n}")] == ["ready"]


async def test_concurrent_promotions_release_one_delivery(pool: Any, ordered_id: UUID) -> None:
    events = await accept(pool, *["k"] * 5)
    [lease] = await queue.claim(pool, 10, 60)
    settled = await settle(pool, settlement(lease))
    promoted = await asyncio.gather(
        *(queue.promote(pool, settled.ended_chains * 2) for _ in range(10))
    )

    assert sum(promoted) == 1
    assert await chain(pool, ordered_id) == [
        (events[1].id, "ready"),
        *((event.id, "blocked") for event in events[2:]),
    ]


async def test_promote_neither_waits_for_nor_skips_a_locked_delivery(
    pool: Any, ordered_id: UUID
) -> None:
    _, second, third = await accept(pool, "k", "k", "k")
    [lease] = await queue.claim(pool, 10, 60)
    settled = await settle(pool, settlement(lease))
    async with pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM delivery_queue WHERE event_id = $1 FOR UPDATE", second.id)
        assert await promptly(queue.promote(pool, settled.ended_chains)) == 0

    assert await chain(pool, ordered_id) == [(second.id, "blocked"), (third.id, "blocked")]
    assert await maintain.promote_stranded(pool, None) == (1, None)
    assert await chain(pool, ordered_id) == [(second.id, "ready"), (third.id, "blocked")]


# --- stranded chains


async def test_stranded_chains_are_found_page_by_page(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [await make_webhook_config(pool, ordered=True) for _ in range(2)]
    keys = [f"k{n}" for n in range(5)]
    await accept(pool, *keys, *keys, *keys)
    leases = await queue.claim(pool, 100, 60)
    # All engines but one crash after the settle.
    await settle(pool, *(settlement(lease) for lease in leases[1:]))
    monkeypatch.setattr(maintain, "_PAGE", 4)

    after, pages = None, []
    for _ in range(3):
        promoted, after = await maintain.promote_stranded(pool, after)
        pages.append((promoted, after is None))
    assert sum(promoted for promoted, _ in pages) == 9
    assert [ended for _, ended in pages] == [False, False, True]
    for webhook_id in configs:
        for key in keys:
            [first, *others] = [state for _, state in await chain(pool, webhook_id, key)]
            assert first in ("ready", "leased")
            assert set(others) == {"blocked"}
    assert (await maintain.promote_stranded(pool, None))[0] == 0


async def test_event_accepted_into_a_stranded_chain_repairs_it(pool: Any, ordered_id: UUID) -> None:
    _, second = await accept(pool, "k", "k")
    [lease] = await queue.claim(pool, 10, 60)
    await settle(pool, settlement(lease))
    [third] = await accept(pool, "k")

    assert await chain(pool, ordered_id) == [(second.id, "ready"), (third.id, "blocked")]


async def test_chain_of_a_deleted_config_is_promoted_for_cancelling(
    pool: Any, ordered_id: UUID
) -> None:
    await accept(pool, "k", "k")
    await pool.execute("UPDATE webhook_configs SET deleted_at = now()")
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")
    assert await maintain.promote_stranded(pool, None) == (1, None)

    [lease] = await queue.claim(pool, 10, 60)
    assert lease.webhook_deleted
    assert await queue.cancel_webhook(pool, ordered_id) == 1


# --- constraints


async def test_constraints_refuse_a_duplicate_chain_position(pool: Any, ordered_id: UUID) -> None:
    place = {"ordering_key": "k", "ordering_position": 1}
    await make_delivery(pool, ordered_id, **place)
    for state in (DeliveryState.READY, DeliveryState.PARKED, DeliveryState.LEASED):
        with pytest.raises(asyncpg.UniqueViolationError, match="delivery_queue_first"):
            await make_delivery(
                pool, ordered_id, state=state, ordering_key="k", ordering_position=2
            )
    await accept(pool, "k", "k")
    with pytest.raises(asyncpg.UniqueViolationError, match="delivery_queue_blocked"):
        await pool.execute(
            "UPDATE delivery_queue SET ordering_position = 3 WHERE state = 'blocked'"
        )
    with pytest.raises(asyncpg.CheckViolationError, match="order_whole"):
        await pool.execute("UPDATE delivery_queue SET due_at = now() WHERE state = 'blocked'")
    with pytest.raises(asyncpg.CheckViolationError, match="order_whole"):
        await make_delivery(pool, ordered_id, ordering_key="k")
