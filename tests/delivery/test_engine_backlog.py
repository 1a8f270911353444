"""Floods are parked, and backlogs are admitted as slots become free."""

import asyncio
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import UUID

import pytest

from core import queue
from postrider.v1 import delivery_service_pb2
from tests.support.factories import make_delivery
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import open_breaker, queue_states, until
from tests.support.receiver import Receiver


async def test_backlog_is_admitted_as_fast_as_it_drains(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, active=False)
    published = await platform.publish_many(20)
    async with platform.engine(max_in_flight_per_webhook=1):
        await platform.update(created.webhook_config.id, active=True)
        began = monotonic()
        await receiver.wait_for(20)
        # The sweep alone would admit one a second.
        assert monotonic() - began < 5
    assert sorted(receiver.message_ids) == sorted(published)


async def test_flood_is_parked_at_publish(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    for _ in range(3):
        await platform.publish_many(300)
    other = (await platform.publish(merchant_id="m_2")).event.id
    assert await queue_states(pool) == {"ready": 101, "parked": 800}
    async with platform.engine():
        await receiver.wait_for(901)
    assert other in receiver.message_ids[:200]
    assert len(set(receiver.message_ids)) == 901


async def test_burst_due_at_one_moment_is_parked_by_few_claims(
    platform: Platform, receiver: Receiver, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await platform.register(receiver.url)
    receiver.default = HeldResponse()
    await platform.publish_many(300, not_before=datetime.now(UTC) + timedelta(seconds=1))
    assert await queue_states(pool) == {"ready": 300}
    await pool.execute("SELECT pg_sleep_until(max(due_at)) FROM delivery_queue")
    genuine = queue.claim
    claims = []

    async def counted(*arguments: Any) -> Any:
        leased = await genuine(*arguments)
        claims.append(len(leased))
        return leased

    async def none_is_ready() -> bool:
        return (await queue_states(pool))["ready"] == 0

    monkeypatch.setattr(queue, "claim", counted)
    async with platform.engine(max_in_flight=20, delivery_drain_seconds=0.1):
        await until(none_is_ready)
        # Parked claim by claim, with 10 deliveries each, it would take 30 claims.
        assert sum(map(bool, claims)) <= 5


async def test_fast_single_events_are_parked_as_flood(
    platform: Platform, pool: Any, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    for _ in range(14):
        await asyncio.gather(*(platform.publish() for _ in range(10)))
    states = await queue_states(pool)
    assert states["parked"] >= 30
    assert states["ready"] <= 110


async def test_event_and_redelivery_queue_behind_backlog(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    finished = await pool.fetchrow("SELECT id, webhook_id FROM finished_deliveries")
    await make_delivery(pool, finished["webhook_id"], state="parked")
    await platform.publish()
    await platform.deliveries.RedeliverDelivery(
        delivery_service_pb2.RedeliverDeliveryRequest(id=f"dlv_{finished['id'].hex}"),
        metadata=platform.merchant(),
    )
    assert await queue_states(pool) == {"parked": 3}
    async with platform.engine():
        await receiver.wait_for(4)


async def test_sweep_admits_backlog_left_by_dead_engine(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    for _ in range(10):
        await make_delivery(
            pool, UUID(created.webhook_config.id.removeprefix("wh_")), state="parked"
        )
    # The breaker is half-open, because the last engine died before its probe.
    await open_breaker(pool, created.webhook_config.id, 0)
    async with platform.engine():
        await receiver.wait_for(10)
