"""A caller that hangs up leaves a change whole or not made, never half."""

import asyncio
from typing import Any

import pytest
import trustme

from postrider.v1 import event_service_pb2, webhook_config_service_pb2
from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.endpoint import held_up
from tests.support.platform import Platform
from tests.support.receiver import Receiver

pb = webhook_config_service_pb2


async def until_waiting_for_a_lock(pool: Any) -> None:
    while not await pool.fetchval(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    ):
        pass


async def until_committed(pool: Any, table: str) -> None:
    async with asyncio.timeout(10):
        while not await count(pool, table):
            pass


async def hang_up(call: Any) -> None:
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def count(pool: Any, table: str) -> int:
    rows: int = await pool.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
    return rows


def create(platform: Platform, url: str) -> Any:
    config = WebhookConfig(url=url, events=["payment.succeeded"])
    return platform.as_merchant().CreateWebhookConfig(webhook_config=config)


async def test_create_cancelled_during_ping_stores_nothing(
    platform: Platform, receiver: Receiver, authority: trustme.CA, pool: Any
) -> None:
    async with held_up(authority) as endpoint:
        creating = create(platform, endpoint.url)
        sent = asyncio.ensure_future(creating.code())
        await endpoint.asked.wait()
        await hang_up(creating)
        await endpoint.given_up.wait()
        await sent
    for _ in range(10):
        await platform.register(receiver.url)
    assert (await count(pool, "webhook_configs"), await count(pool, "audit_entries")) == (10, 10)


async def test_create_cancelled_during_commit_is_stored_and_audited(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE audit_entries IN SHARE MODE")
        creating = create(platform, receiver.url)
        ended = asyncio.ensure_future(creating.code())
        await until_waiting_for_a_lock(pool)
        await hang_up(creating)
        await ended
        # A call after it shows that the server has heard of the hanging up.
        await platform.publish()
    await until_committed(pool, "webhook_configs")
    assert (await count(pool, "webhook_configs"), await count(pool, "audit_entries")) == (1, 1)


async def test_publish_cancelled_during_commit_is_stored_completely(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    event = EventInput(
        merchant_id="m_1", type="payment.succeeded", payload=b"1", idempotency_key="order-1"
    )
    request = event_service_pb2.PublishEventRequest(event=event)
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE delivery_queue IN SHARE MODE")
        publishing = platform.events.PublishEvent(request, metadata=platform.producer())
        ended = asyncio.ensure_future(publishing.code())
        await until_waiting_for_a_lock(pool)
        await hang_up(publishing)
        await ended
        await platform.as_merchant().ListEventTypes()
    await until_committed(pool, "events")
    tables = ("events", "idempotency_keys", "delivery_queue")
    assert [await count(pool, table) for table in tables] == [1, 1, 1]

    again = await platform.events.PublishEvent(request, metadata=platform.producer())
    assert again.duplicate
    assert [await count(pool, table) for table in tables] == [1, 1, 1]
    async with platform.engine():
        await receiver.wait_for(1)


async def test_delete_cancelled_by_caller_completes(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await platform.publish()
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE finished_deliveries IN SHARE MODE")
        deleting = platform.as_merchant().DeleteWebhookConfig(id=webhook_id)
        ended = asyncio.ensure_future(deleting.code())
        await until_waiting_for_a_lock(pool)
        await hang_up(deleting)
        await ended
    await until_committed(pool, "finished_deliveries")
    deleted = await pool.fetchval("SELECT deleted_at IS NOT NULL FROM webhook_configs")
    assert deleted
    assert await count(pool, "delivery_queue") == 0
    assert await count(pool, "finished_deliveries") == 1
    assert await count(pool, "audit_entries") == 2
