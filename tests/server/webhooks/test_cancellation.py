"""A change whose caller cancels the call is made completely or not at all."""

import asyncio
from typing import Any

import pytest
import trustme

from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.endpoint import held_up
from tests.support.factories import count_rows, locked, until_blocked
from tests.support.platform import Platform
from tests.support.receiver import Receiver


async def cancel(call: Any) -> None:
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def cancel_blocked_call(pool: Any, table: str, start: Any, platform: Platform) -> None:
    """Cancel a call while it waits for a lock on a table, and return when it has committed."""
    async with locked(pool, table):
        call = start()
        ended = asyncio.ensure_future(call.code())
        await until_blocked(pool)
        await cancel(call)
        await ended
        # A later call on the connection shows that the server received the cancellation.
        await platform.as_merchant().ListEventTypes()
    async with asyncio.timeout(10):
        while not await count_rows(pool, table):
            pass


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
        await cancel(creating)
        await endpoint.given_up.wait()
        await sent
    # The cancelled create does not count towards the quota of ten.
    for _ in range(10):
        await platform.register(receiver.url)
    assert await count_rows(pool, "webhook_configs") == 10
    assert await count_rows(pool, "audit_entries") == 10


async def test_create_cancelled_during_commit_is_stored_and_audited(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await cancel_blocked_call(
        pool, "audit_entries", lambda: create(platform, receiver.url), platform
    )
    assert await count_rows(pool, "webhook_configs") == 1
    assert await count_rows(pool, "audit_entries") == 1


async def test_publish_cancelled_during_commit_is_stored_completely(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    event = EventInput(
        merchant_id="m_1", type="payment.succeeded", payload=b"1", idempotency_key="order-1"
    )
    publish = platform.as_producer().PublishEvent
    await cancel_blocked_call(pool, "delivery_queue", lambda: publish(event=event), platform)
    tables = ("events", "idempotency_keys", "delivery_queue")
    assert [await count_rows(pool, table) for table in tables] == [1, 1, 1]

    assert (await publish(event=event)).duplicate
    assert [await count_rows(pool, table) for table in tables] == [1, 1, 1]
    async with platform.engine():
        await receiver.wait_for(1)


async def test_delete_cancelled_by_caller_completes(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await platform.publish()
    delete = platform.as_merchant().DeleteWebhookConfig
    await cancel_blocked_call(pool, "finished_deliveries", lambda: delete(id=webhook_id), platform)
    assert await pool.fetchval("SELECT deleted_at IS NOT NULL FROM webhook_configs")
    assert await count_rows(pool, "delivery_queue") == 0
    assert await count_rows(pool, "finished_deliveries") == 1
    assert await count_rows(pool, "audit_entries") == 2
