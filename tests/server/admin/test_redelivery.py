"""RedeliverDeliveries: failed deliveries of a time range are sent again, each once."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from grpc import StatusCode

from core.ids import format_id
from postrider.v1 import delivery_pb2
from server.admin import redelivery
from tests.support.factories import (
    locked,
    make_delivery,
    make_webhook_config,
    states,
    until_blocked,
)
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import pages

_FAIL = """
WITH finished AS (DELETE FROM delivery_queue WHERE id = ANY ($1) RETURNING *), recorded AS (
    INSERT INTO attempts (delivery_id, number, outcome, detail, started_at, duration_us)
    SELECT f.id, n, CASE n WHEN 2 THEN $2 ELSE 'timeout' END, '', now(), 1
    FROM finished f, generate_series(1, 2) n
)
INSERT INTO finished_deliveries (id, state, webhook_id, event_id, merchant_id, event_type,
    attempt_count, created_at, redelivery_of)
SELECT id, $3, webhook_id, event_id, merchant_id, event_type, 2, created_at, redelivery_of
FROM finished
"""


async def redeliver(platform: Platform, **fields: Any) -> tuple[int, int, int]:
    """(redelivered, already redelivered, skipped) in all pages, by default of the last hour."""
    now = datetime.now(UTC)
    request = {"start_time": now - timedelta(hours=1), "end_time": now, **fields}
    answers = await pages(platform.as_operator().RedeliverDeliveries, **request)
    return (
        sum(answer.redelivered for answer in answers),
        sum(answer.already_redelivered for answer in answers),
        sum(answer.skipped for answer in answers),
    )


async def finish(
    pool: Any, ids: Sequence[UUID], outcome: str = "connection_error", state: str = "failed"
) -> None:
    """Finish deliveries after two attempts, the last with `outcome`."""
    await pool.execute(_FAIL, ids, outcome, state)
    # The end of the range is exclusive and has a resolution of one millisecond.
    await pool.execute("SELECT pg_sleep(0.002)")


async def failed_deliveries(pool: Any, count: int, **overrides: Any) -> list[UUID]:
    """Failed deliveries of a new webhook config."""
    outcome = overrides.pop("outcome", "connection_error")
    webhook_id = await make_webhook_config(pool, **overrides)
    merchant_id = overrides.get("merchant_id", "m_1")
    ids = [await make_delivery(pool, webhook_id, merchant_id=merchant_id) for _ in range(count)]
    await finish(pool, ids, outcome)
    return ids


async def open_ones(pool: Any) -> list[UUID]:
    rows = await pool.fetch("SELECT redelivery_of FROM delivery_queue ORDER BY redelivery_of")
    return [row["redelivery_of"] for row in rows]


async def test_failed_deliveries_are_redelivered_exactly_once(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    for merchant_id in ("m_1", "m_2"):
        await platform.register(f"{receiver.url}/{merchant_id}", merchant_id)
        await platform.publish(f'"{merchant_id}"', merchant_id=merchant_id)
    ids = [row["id"] for row in await pool.fetch("SELECT id FROM delivery_queue")]
    await finish(pool, ids)

    assert await redeliver(platform, dry_run=True) == (2, 0, 0)
    assert await open_ones(pool) == []
    assert await redeliver(platform) == (2, 0, 0)
    assert await open_ones(pool) == sorted(ids)
    assert await redeliver(platform) == (0, 2, 0)
    async with platform.engine():
        await receiver.wait_for(2)

    assert {request.body for request in receiver.webhooks} == {b'"m_1"', b'"m_2"'}
    assert await states(pool) == ["delivered"] * 2 + ["failed"] * 2
    # Delivered redeliveries are not sent again.
    assert await redeliver(platform) == (0, 2, 0)


async def test_failed_redelivery_can_be_redelivered(platform: Platform, pool: Any) -> None:
    await failed_deliveries(pool, 3)
    end = datetime.now(UTC)
    await redeliver(platform, end_time=end)
    [again, *others] = [row["id"] for row in await pool.fetch("SELECT id FROM delivery_queue")]
    await finish(pool, [again])
    await finish(pool, others, "succeeded", "delivered")

    # The range of the dry run holds the delivery and its failed redelivery. Only one is sent.
    assert await redeliver(platform, dry_run=True) == (1, 3, 0)
    assert await redeliver(platform, end_time=end) == (1, 2, 0)
    assert await redeliver(platform, end_time=end) == (0, 3, 0)


async def test_redelivery_filters_combine(platform: Platform, pool: Any) -> None:
    [first] = await failed_deliveries(pool, 1, merchant_id="m_1")
    middle = datetime.now(UTC)
    await failed_deliveries(pool, 2, merchant_id="m_1", outcome="internal_error")
    await failed_deliveries(pool, 4, merchant_id="m_2", outcome="http_error")
    delivered = await make_delivery(pool, await make_webhook_config(pool))
    await finish(pool, [delivered], "succeeded", "delivered")
    cancelled = await make_delivery(pool, await make_webhook_config(pool))
    await finish(pool, [cancelled], state="cancelled")
    webhook_id = await pool.fetchval(
        "SELECT webhook_id FROM finished_deliveries WHERE id = $1", first
    )
    ours = [delivery_pb2.OUTCOME_CONNECTION_ERROR, delivery_pb2.OUTCOME_INTERNAL_ERROR]

    for expected, fields in (
        (7, {}),
        (3, {"merchant_id": "m_1"}),
        (1, {"webhook_id": format_id("wh", webhook_id)}),
        (0, {"webhook_id": format_id("wh", webhook_id), "merchant_id": "m_2"}),
        (3, {"outcomes": ours}),
        (1, {"outcomes": ours[:1]}),
        # The outcome of an attempt before the last.
        (0, {"outcomes": [delivery_pb2.OUTCOME_TIMEOUT]}),
        (1, {"end_time": middle}),
        (6, {"start_time": middle}),
    ):
        assert await redeliver(platform, dry_run=True, **fields) == (expected, 0, 0), fields
    assert await redeliver(platform, outcomes=ours, end_time=middle) == (1, 0, 0)
    assert await open_ones(pool) == [first]


async def test_undeliverable_deliveries_are_skipped_and_counted(
    platform: Platform, pool: Any
) -> None:
    await failed_deliveries(pool, 1, deleted_at=datetime.now(UTC))
    [retired] = await failed_deliveries(pool, 1)
    await pool.execute(
        "DELETE FROM events USING finished_deliveries f WHERE events.id = f.event_id AND f.id = $1",
        retired,
    )
    assert await redeliver(platform) == (0, 0, 2)
    assert await open_ones(pool) == []
    assert not await pool.fetchval("SELECT count(*) FROM audit_entries")


async def test_bulk_redelivery_parks_deliveries_above_the_ready_limit(
    platform: Platform, pool: Any
) -> None:
    await failed_deliveries(pool, 105)
    await failed_deliveries(pool, 1, active=False, merchant_id="m_2")
    busy = await make_webhook_config(pool, merchant_id="m_3")
    await make_delivery(pool, busy, state="parked", merchant_id="m_3")
    await finish(pool, [await make_delivery(pool, busy, merchant_id="m_3")])

    assert await redeliver(platform) == (107, 0, 0)
    rows = await pool.fetch(
        "SELECT merchant_id, state, count(*) FROM delivery_queue GROUP BY 1, 2 ORDER BY 1, 2"
    )
    assert [tuple(row) for row in rows] == [
        ("m_1", "parked", 5),
        ("m_1", "ready", 100),
        ("m_2", "parked", 1),
        ("m_3", "parked", 2),
    ]


async def test_bulk_redelivery_pages_and_audits_each_transaction(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redelivery, "_PAGE", 2)
    monkeypatch.setattr(redelivery, "_PAGES", 2)
    ids = [
        *await failed_deliveries(pool, 3, merchant_id="m_2"),
        *await failed_deliveries(pool, 4, merchant_id="m_1"),
    ]
    start, end = datetime(2026, 1, 2, tzinfo=UTC), datetime.now(UTC)
    request: dict[str, Any] = {
        "start_time": start,
        "end_time": end,
        "outcomes": [delivery_pb2.OUTCOME_CONNECTION_ERROR],
    }
    redeliver_once = platform.as_operator().RedeliverDeliveries
    answer = await redeliver_once(**request)
    assert (answer.redelivered, len(await open_ones(pool))) == (4, 4)
    request["page_token"] = answer.next_page_token
    answer = await redeliver_once(**request)
    assert (answer.redelivered, answer.next_page_token) == (3, "")

    assert await open_ones(pool) == sorted(ids)
    rows = await pool.fetch(
        "SELECT actor, action, resource, merchant_id, comment FROM audit_entries ORDER BY id"
    )
    who = ("tester", "RedeliverDeliveries", "", None)
    of = f"of those made from {start.isoformat()} to {end.isoformat()}, connection_error"
    assert [tuple(row) for row in rows] == [(*who, f"{n} {of}") for n in (2, 2, 2, 1)]
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
        await redeliver_once(**request, merchant_id="m_1")


async def test_concurrent_bulk_redeliveries_create_one_delivery_each(
    platform: Platform, pool: Any
) -> None:
    await failed_deliveries(pool, 3)
    async with locked(pool, "delivery_queue"):
        calls = [asyncio.create_task(redeliver(platform)) for _ in range(2)]
        await until_blocked(pool, len(calls))
    answers = await asyncio.gather(*calls)
    assert sorted(answers) == [(0, 3, 0), (3, 0, 0)]


async def test_bulk_redelivery_refuses_open_range_and_bad_filters(
    platform: Platform, pool: Any
) -> None:
    await failed_deliveries(pool, 1)
    now = datetime.now(UTC)
    for times, message in (
        ({"start_time": None}, "start_time: is required"),
        ({"end_time": None}, "end_time: is required"),
        ({"end_time": now + timedelta(minutes=5)}, "end_time: must have passed"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_RANGE_OPEN") as error:
            await redeliver(platform, **times)
        assert error.message.startswith(message)
    for reason, fields in (
        ("TIME_RANGE_EMPTY", {"start_time": now, "end_time": now}),
        ("MERCHANT_ID_INVALID", {"merchant_id": "no merchant"}),
        ("ID_INVALID", {"webhook_id": "m_1"}),
        ("OUTCOME_UNKNOWN", {"outcomes": [delivery_pb2.OUTCOME_HTTP_ERROR, 99]}),
        ("OUTCOME_UNKNOWN", {"outcomes": [delivery_pb2.OUTCOME_UNSPECIFIED]}),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, reason):
            await redeliver(platform, **fields)
    assert await open_ones(pool) == []
