"""Callers that ask too much are refused, by a real server, with a time to come back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from postrider.v1 import delivery_service_pb2, event_pb2, event_service_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
from tests.support.platform import bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import Refusal, refusal_of, refused

AMPLE = 10
#: So slow that no place comes free during a test.
NEVER = 0.0001


class SilentReceiver:
    """Takes connections and says nothing, until the test ends them."""

    def __init__(self) -> None:
        self.port = 0
        self.connected = asyncio.Semaphore(0)
        self.silence = asyncio.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/hook"

    async def answer(self, _reader: Any, writer: asyncio.StreamWriter) -> None:
        self.connected.release()
        await self.silence.wait()
        writer.close()


@asynccontextmanager
async def silent_receiver() -> AsyncIterator[SilentReceiver]:
    receiver = SilentReceiver()
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        receiver.silence.set()
        server.close()
        await server.wait_closed()


def assert_too_many(error: Refusal, reason: str, subject: str) -> None:
    assert (error.code, error.reason) == (StatusCode.RESOURCE_EXHAUSTED, reason), error.message
    assert error.quota_subjects == [subject]
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0


async def outcome(call: Any) -> str:
    """OK, or the reason of the refusal."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refusal = Refusal()
        refusal.read(error)
        return refusal.reason
    return "OK"


async def test_one_callers_flood_is_refused_and_leaves_the_others_alone(
    start_platform: Callable[..., Any],
) -> None:
    async with start_platform(service_call_rate=NEVER, service_call_burst=3) as platform:
        for _ in range(3):
            await platform.publish()
        error = await refusal_of(platform.publish())
        assert_too_many(error, "CALL_RATE_LIMIT", "caller:tester")
        other = bearer(platform.token("webhooks:manage", subject="other"))
        await platform.webhooks.ListEventTypes(pb.ListEventTypesRequest(), metadata=other)


async def test_a_merchants_calls_count_together_whoever_makes_them(
    start_platform: Callable[..., Any],
) -> None:
    async with start_platform(merchant_call_rate=NEVER, merchant_call_burst=2) as platform:

        def calling(subject: str, merchant_id: str) -> Any:
            token = platform.token("webhooks:manage", merchant_id=merchant_id, subject=subject)
            request = pb.ListWebhookConfigsRequest()
            return platform.webhooks.ListWebhookConfigs(request, metadata=bearer(token))

        await calling("gateway", "m_1")
        await calling("app", "m_1")
        error = await refusal_of(calling("third", "m_1"))
        assert_too_many(error, "CALL_RATE_LIMIT", "merchant:m_1")
        await calling("gateway", "m_2")


async def test_refused_streams_end_with_the_same_refusal(
    start_platform: Callable[..., Any],
) -> None:
    async with start_platform(service_call_rate=NEVER, service_call_burst=1) as platform:
        await platform.publish()
        async with refused(StatusCode.RESOURCE_EXHAUSTED, "CALL_RATE_LIMIT"):
            call = platform.events.StreamEvents(metadata=platform.producer())
            await call.read()


async def test_registrations_have_a_smaller_bucket_and_reads_go_on(
    start_platform: Callable[..., Any], receiver: Receiver
) -> None:
    async with start_platform(registration_rate=NEVER, registration_burst=2) as platform:
        config = (await platform.register(receiver.url)).webhook_config
        await platform.webhooks.PingWebhookConfig(
            pb.PingWebhookConfigRequest(id=config.id), metadata=platform.merchant()
        )
        pings = len(receiver.requests)
        error = await refusal_of(platform.register(receiver.url))
        assert_too_many(error, "REGISTRATION_RATE_LIMIT", "merchant:m_1")
        assert len(receiver.requests) == pings
        await platform.webhooks.GetWebhookConfig(
            pb.GetWebhookConfigRequest(id=config.id), metadata=platform.merchant()
        )
        await platform.register(receiver.url, "m_2")


async def test_pings_at_once_are_bounded_for_each_merchant(
    start_platform: Callable[..., Any], receiver: Receiver
) -> None:
    async with (
        silent_receiver() as silent,
        start_platform(max_pings_per_merchant=1) as platform,
    ):
        waiting = asyncio.create_task(refusal_of(platform.register(silent.url)))
        async with asyncio.timeout(AMPLE):
            await silent.connected.acquire()
        error = await refusal_of(platform.register(receiver.url))
        assert_too_many(error, "PINGS_LIMIT", "merchant:m_1")
        assert not receiver.requests
        await platform.register(receiver.url, "m_2")
        silent.silence.set()
        assert (await waiting).reason == "URL_UNREACHABLE"
        await platform.register(receiver.url)


async def test_a_caller_that_hangs_up_gives_its_place_back(
    start_platform: Callable[..., Any], receiver: Receiver
) -> None:
    async with (
        silent_receiver() as silent,
        start_platform(max_pings_per_merchant=1) as platform,
    ):
        waiting = asyncio.create_task(platform.register(silent.url))
        async with asyncio.timeout(AMPLE):
            await silent.connected.acquire()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # The server hears of it a moment later, and nobody signals that.
        async with asyncio.timeout(AMPLE):
            while (await outcome(platform.register(receiver.url))) == "PINGS_LIMIT":
                pass


async def test_one_merchants_streams_are_bounded_and_leave_the_others_room(
    start_platform: Callable[..., Any],
) -> None:
    def watch(merchant_id: str) -> Any:
        request = delivery_service_pb2.WatchDeliveriesRequest()
        return platform.deliveries.WatchDeliveries(request, metadata=platform.merchant(merchant_id))

    def publishing(**claims: str) -> Any:
        token = platform.token("events:publish", **claims)
        return platform.events.StreamEvents(metadata=bearer(token))

    event = event_pb2.EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"{}")
    batch = event_service_pb2.StreamEventsRequest(sequence=1, events=[event])
    async with start_platform(max_streams_per_merchant=2, max_concurrent_rpcs=5) as platform:
        open_ = [watch("m_1"), publishing(merchant_id="m_1")]
        await open_[0].read()
        await open_[1].write(batch)
        await open_[1].read()
        for refused_ in (watch("m_1"), publishing(merchant_id="m_1")):
            error = await refusal_of(refused_.read())
            assert error.reason == "STREAMS_LIMIT"
            assert error.quota_subjects == ["merchant:m_1"]
            assert error.retry_after_seconds is None
        others = [watch("m_2"), publishing()]
        await others[0].read()
        await others[1].write(batch)
        await others[1].read()
        assert (await platform.publish()).event.id
        open_[0].cancel()
        # The server hears of it a moment later, and nobody signals that.
        async with asyncio.timeout(AMPLE):
            while await outcome((again := watch("m_1")).read()) == "STREAMS_LIMIT":
                pass
        for stream in (*open_, *others, again):
            stream.cancel()
