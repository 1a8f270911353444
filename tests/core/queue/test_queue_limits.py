"""Limits of a config: event prefixes, rate limit and in-flight limit."""

import asyncio
from collections import Counter
from typing import Any
from uuid import UUID

import pytest

from core import queue
from core.ids import new_id
from tests.support.factories import make_delivery, make_event, make_webhook_config, promptly, states


async def _used_until(pool: Any, webhook_id: UUID, seconds_ago: float | None) -> None:
    await pool.execute(
        "UPDATE webhook_configs SET rate_used_until = now() - $2 * interval '1 second'"
        " WHERE id = $1",
        webhook_id,
        seconds_ago,
    )


@pytest.mark.parametrize(
    ("filters", "event_type", "matches"),
    [
        (["payment.*"], "payment.succeeded", True),
        (["payment.*"], "payment.intent.created", True),
        (["payment.intent.*"], "payment.intent.created", True),
        (["payment.*", "payment.succeeded", "payment.intent.*"], "payment.succeeded", True),
        (["refund.failed", "payment.*"], "payment.succeeded", True),
        (["payment.succeeded"], "payment.succeeded", True),
        (["payment.*"], "payments.succeeded", False),
        (["pay.*"], "payment.succeeded", False),
        (["payment.succeeded.*"], "payment.succeeded", False),
        (["payment.intent.*"], "payment.succeeded", False),
        (["succeeded.*"], "payment.succeeded", False),
        (["payment.succeeded"], "payment.succeeded.late", False),
    ],
)
async def test_prefix_matches_whole_segments_once(
    pool: Any, filters: list[str], event_type: str, matches: bool
) -> None:
    await make_webhook_config(pool, events=filters)
    event, other = make_event(type=event_type), make_event(type="invoice.paid")

    accepted = await queue.enqueue(pool, [event, other])

    assert accepted.delivery_counts == [1 if matches else 0, 0]
    assert await states(pool) == ["ready"] * matches


async def test_prefix_of_another_merchant_does_not_match(pool: Any) -> None:
    await make_webhook_config(pool, events=["payment.*"], merchant_id="m_2")
    event = make_event()
    assert (await queue.enqueue(pool, [event])).delivery_counts == [0]


async def test_unused_rate_grants_one_second_and_one_more(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, rate_limit=1.0)

    assert await queue.spend_rate(pool, {webhook_id: 1}) == {webhook_id: (1, 0.0)}
    granted, next_in = (await queue.spend_rate(pool, {webhook_id: 5}))[webhook_id]

    assert granted == 1
    assert 0 < next_in <= 1
    assert (await queue.spend_rate(pool, {webhook_id: 5}))[webhook_id][0] == 0


@pytest.mark.parametrize(
    ("rate", "ago", "granted"),
    [(2.0, 1.1, 2), (0.5, 0.0, 0), (10.0, 3600.0, 11), (0.001, 1050.0, 1), (0.001, 900.0, 0)],
)
async def test_rate_refills_with_database_time(
    pool: Any, rate: float, ago: float, granted: int
) -> None:
    webhook_id = await make_webhook_config(pool, rate_limit=rate)
    await _used_until(pool, webhook_id, ago)

    assert (await queue.spend_rate(pool, {webhook_id: 100}))[webhook_id][0] == granted


async def test_clock_set_back_costs_at_most_one_burst(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, rate_limit=2.0)
    for _ in range(8):
        await make_delivery(pool, webhook_id, state="parked")
    await _used_until(pool, webhook_id, -3600.0)

    assert await queue.admit(pool, {webhook_id: 16}) == {webhook_id}
    assert Counter(await states(pool, webhook_id)) == {"ready": 3, "parked": 5}
    assert (await queue.spend_rate(pool, {webhook_id: 8}))[webhook_id][0] == 3
    assert (await queue.spend_rate(pool, {webhook_id: 8}))[webhook_id][0] == 0


async def test_tokens_spent_by_a_later_statement_stay_spent(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, rate_limit=2.0)
    await _used_until(pool, webhook_id, -5.0)
    assert (await queue.spend_rate(pool, {webhook_id: 8}))[webhook_id][0] == 0


async def test_concurrent_grants_never_exceed_the_rate(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, rate_limit=3.0)
    before = await pool.fetchval("SELECT clock_timestamp()")

    answers = await asyncio.gather(*(queue.spend_rate(pool, {webhook_id: 1}) for _ in range(100)))

    elapsed = (await pool.fetchval("SELECT clock_timestamp()") - before).total_seconds()
    granted = sum(answer.get(webhook_id, (0, 0))[0] for answer in answers)
    assert 1 <= granted <= 4 + 3 * elapsed


async def test_locked_config_is_skipped_without_waiting(pool: Any) -> None:
    locked, free = [await make_webhook_config(pool, rate_limit=5.0) for _ in range(2)]
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT 1 FROM webhook_configs WHERE id = $1 FOR UPDATE", locked)
        assert await promptly(queue.spend_rate(pool, {locked: 1, free: 1})) == {free: (1, 0.0)}


async def test_missing_limit_or_config_grants_nothing(pool: Any, webhook_id: UUID) -> None:
    assert await queue.spend_rate(pool, {webhook_id: 1, new_id(): 1}) == {}


@pytest.mark.parametrize(
    ("due", "leased", "admitted"), [(0, 0, 2), (1, 0, 1), (2, 0, 0), (0, 2, 2)]
)
async def test_admission_stops_at_the_remaining_rate(
    pool: Any, due: int, leased: int, admitted: int
) -> None:
    """The rate has two left. Due deliveries will use them, leased ones already have."""
    webhook_id = await make_webhook_config(pool, rate_limit=2.0)
    for state, count in (("ready", due), ("leased", leased), ("parked", 8)):
        for _ in range(count):
            await make_delivery(pool, webhook_id, state=state)
    await _used_until(pool, webhook_id, 1.1)

    await queue.admit(pool, {webhook_id: 16})

    counts = Counter(await states(pool, webhook_id))
    assert counts["ready"] - due == admitted
    assert counts["parked"] == 8 - admitted


@pytest.mark.parametrize(("own", "admitted"), [(2, 2), (0, 4), (100, 4)])
async def test_admission_fills_the_lower_of_both_in_flight_limits(
    pool: Any, own: int, admitted: int
) -> None:
    webhook_id = await make_webhook_config(pool, max_in_flight=own)
    for _ in range(8):
        await make_delivery(pool, webhook_id, state="parked")

    await queue.admit(pool, {webhook_id: 4})

    assert Counter(await states(pool, webhook_id)) == {"ready": admitted, "parked": 8 - admitted}
