"""WatchDeliveries: which attempts are sent, in which order, and how a watch ends."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
from grpc import StatusCode

from core import queue
from core.ids import format_id, new_id
from core.lifecycle import Outcome
from postrider.v1 import delivery_pb2, delivery_service_pb2_grpc
from postrider.v1 import delivery_service_pb2 as pb
from server.deliveries.tail import (
    newest_position,
    read_recorded,
)
from tests.support.factories import (
    lease_many,
    lease_one,
    make_webhook_config,
    rescheduled,
    settle,
    settlement,
)
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.watching import named, record, record_many, watching


async def test_watch_sends_each_recorded_attempt_with_its_delivery(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 503
    async with watching(platform) as watch, platform.engine(max_retries=0):
        event = (await platform.publish()).event
        answer = await watch.read()
    delivery = answer.delivery
    assert (delivery.event_id, delivery.webhook_id) == (event.id, created.webhook_config.id)
    assert (delivery.state, delivery.attempt_count) == (delivery_pb2.DELIVERY_STATE_FAILED, 1)
    [attempt] = delivery.attempts
    assert (attempt.number, attempt.status_code) == (1, 503)
    assert attempt.remote_address == "127.0.0.1"
    assert answer.resume_token


async def test_watch_sends_only_attempts_recorded_after_its_start(
    platform: Platform, pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    await record(pool, webhook_id)
    delivery = await lease_one(pool, webhook_id)
    async with watching(platform) as watch:
        await settle(pool, rescheduled(delivery, seconds=0))
        assert await watch.news(1) == named(delivery)
        [delivery] = await queue.claim(pool, 10, 60)
        await settle(pool, settlement(delivery))
        assert await watch.news(1) == named(delivery, number=2)


async def test_watch_filters_by_merchant_config_and_type(platform: Platform, pool: Any) -> None:
    mine, other = [await make_webhook_config(pool) for _ in range(2)]
    theirs = await make_webhook_config(pool, merchant_id="m_2")
    wanted = format_id("wh", mine)
    async with (
        watching(platform) as every,
        watching(platform, webhook_id=wanted) as of_webhook,
        watching(platform, event_type="refund.failed") as of_type,
        watching(platform, webhook_id=wanted, event_type="refund.failed") as of_both,
        watching(platform, "m_2") as foreign,
    ):
        first = await record(pool, other)
        second = await record(pool, mine)
        third = await record(pool, theirs, merchant_id="m_2")
        fourth = await record(pool, other, event_type="refund.failed")
        fifth = await record(pool, mine, event_type="refund.failed")
        last = await record(pool, theirs, merchant_id="m_2", event_type="refund.failed")
        assert await every.news(4) == named(first, second, fourth, fifth)
        assert await of_webhook.news(2) == named(second, fifth)
        assert await of_type.news(2) == named(fourth, fifth)
        assert await of_both.news(1) == named(fifth)
        assert await foreign.news(2) == named(third, last)


async def test_watch_sends_attempts_that_commit_out_of_order(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    slow, quick = await lease_many(pool, webhook_id, 2)
    before = await newest_position(pool)
    async with watching(platform) as watch, pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await queue.settle(connection, [settlement(slow)], 10)
        await settle(pool, settlement(quick))
        # `quick` is committed, but an attempt before it may still commit.
        batch = await read_recorded(pool, before, ["m_1"])
        assert format_id("dlv", quick.id) not in {
            format_id("dlv", one.delivery.id) for one in batch.recorded
        }
        reading = asyncio.create_task(watch.news(2))
        await transaction.commit()
        assert await reading == named(slow, quick)
    after = await read_recorded(pool, batch.end, ["m_1"])
    assert [one.delivery.id for one in after.recorded] == [slow.id, quick.id]


async def test_watch_skips_rolled_back_attempts(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    first, second = await lease_many(pool, webhook_id, 2)
    async with watching(platform) as watch:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await queue.settle(connection, [settlement(first)], 10)
            await transaction.rollback()
        await settle(pool, settlement(second))
        await settle(pool, settlement(first, outcome=Outcome.SUCCEEDED))
        assert await watch.news(2) == named(second, first)


async def test_caller_that_reads_nothing_does_not_block_others(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with (
        start_platform(watch_backlog=100) as platform,
        watching(platform),
        watching(platform, event_type="refund.failed") as quick,
    ):
        # More than the connection buffers for the caller that does not read.
        await record_many(pool, webhook_id, 1500)
        delivery = await record(pool, webhook_id, event_type="refund.failed")
        assert await quick.news(1) == named(delivery)


async def test_invalid_watch_filters_are_refused(platform: Platform, pool: Any) -> None:
    theirs = format_id("wh", await make_webhook_config(pool, merchant_id="m_2"))
    unknown = format_id("wh", new_id())
    for request, code, reason in (
        ({"webhook_id": "wh_1"}, StatusCode.INVALID_ARGUMENT, "ID_INVALID"),
        ({"event_type": "\x00"}, StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_NAME_INVALID"),
        ({"webhook_id": theirs}, StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"),
        ({"webhook_id": unknown}, StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"),
    ):
        async with refused(code, reason), watching(platform, **request):
            pass


async def test_watch_ends_when_its_bearer_token_expires(platform: Platform) -> None:
    token = platform.token("webhooks:manage", merchant_id="m_1", lifetime=timedelta(seconds=2))
    call = platform.calls(bearer(token)).WatchDeliveries()
    async with (
        asyncio.timeout(20),
        refused(StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED") as error,
    ):
        async for answer in call:
            assert answer.resume_token
    assert "resume_token" in error.message


async def test_server_stop_ends_watches_at_once(
    start_platform: Callable[..., Any],
) -> None:
    loop = asyncio.get_running_loop()
    async with start_platform(server_drain_seconds=60) as platform:
        channel = grpc.aio.insecure_channel(platform.address)
        call = delivery_service_pb2_grpc.DeliveryServiceStub(channel).WatchDeliveries(
            pb.WatchDeliveriesRequest(), metadata=platform.merchant()
        )
        assert await call.read() is not grpc.aio.EOF
        reading = asyncio.ensure_future(call.read())
        began = loop.time()
    assert loop.time() - began < 30
    async with refused(StatusCode.UNAVAILABLE, "SERVER_STOPPING") as error:
        await reading
    assert error.retry_after_seconds
    await channel.close()
