"""A real server refuses calls beyond a caller's limits with a retry delay."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from grpc import StatusCode

from postrider.v1 import event_pb2, event_service_pb2
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of, refused
from tests.support.rpcs import code_of

AMPLE = 10
#: A rate so low that no call is admitted by it during a test.
NEVER = 0.0001


class SilentReceiver:
    """Accepts connections and sends nothing until `silence` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.connected = asyncio.Event()
        self.silence = asyncio.Event()

    async def answer(self, _reader: Any, writer: asyncio.StreamWriter) -> None:
        self.connected.set()
        await self.silence.wait()
        writer.close()

    async def until_connected(self) -> None:
        await asyncio.wait_for(self.connected.wait(), AMPLE)


@pytest.fixture
async def silent() -> AsyncIterator[SilentReceiver]:
    receiver = SilentReceiver()
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    try:
        yield receiver
    finally:
        receiver.silence.set()
        server.close()
        await server.wait_closed()


async def assert_too_many(call: Any, reason: str, subject: str) -> None:
    async with refused(StatusCode.RESOURCE_EXHAUSTED, reason) as error:
        await call
    assert error.quota_subjects == [subject]
    assert error.retry_after_seconds is not None
    assert error.retry_after_seconds > 0


async def until_admitted(call: Callable[[], Awaitable[Any]]) -> None:
    """Repeat the call while it is refused: the server notices a cancelled call a moment later."""
    async with asyncio.timeout(AMPLE):
        while await code_of(call()) is StatusCode.RESOURCE_EXHAUSTED:
            pass


@pytest.mark.server(service_call_rate=NEVER, service_call_burst=3)
async def test_call_limit_of_one_caller_does_not_affect_others(platform: Platform) -> None:
    for _ in range(3):
        await platform.publish()
    await assert_too_many(platform.publish(), "CALL_RATE_LIMIT", "caller:tester")
    other = platform.calls(bearer(platform.token("webhooks:manage", subject="other")))
    await other.ListEventTypes()


@pytest.mark.server(service_call_rate=NEVER, service_call_burst=1)
async def test_stream_beyond_the_limit_is_refused(platform: Platform) -> None:
    await platform.publish()
    stream = platform.events.StreamEvents(metadata=platform.producer())
    await assert_too_many(stream.read(), "CALL_RATE_LIMIT", "caller:tester")


@pytest.mark.server(registration_rate=NEVER, registration_burst=2)
async def test_registration_limit_does_not_affect_reads(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.as_merchant().PingWebhookConfig(id=config.id)
    pings = len(receiver.requests)
    register = platform.register(receiver.url)
    await assert_too_many(register, "REGISTRATION_RATE_LIMIT", "merchant:m_1")
    assert len(receiver.requests) == pings
    await platform.config(config.id)
    await platform.register(receiver.url, "m_2")


@pytest.mark.server(max_pings_per_merchant=1)
async def test_concurrent_pings_are_limited_per_merchant(
    platform: Platform, receiver: Receiver, silent: SilentReceiver
) -> None:
    waiting = asyncio.create_task(refusal_of(platform.register(silent.url)))
    await silent.until_connected()
    await assert_too_many(platform.register(receiver.url), "PINGS_LIMIT", "merchant:m_1")
    assert not receiver.requests
    await platform.register(receiver.url, "m_2")
    silent.silence.set()
    assert (await waiting).reason == "URL_UNREACHABLE"
    await platform.register(receiver.url)


@pytest.mark.server(max_pings_per_merchant=1)
async def test_cancelled_call_releases_its_ping_slot(
    platform: Platform, receiver: Receiver, silent: SilentReceiver
) -> None:
    waiting = asyncio.create_task(platform.register(silent.url))
    await silent.until_connected()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until_admitted(lambda: platform.register(receiver.url))


@pytest.mark.server(max_streams_per_merchant=2, max_concurrent_rpcs=5)
async def test_concurrent_streams_are_limited_per_merchant(platform: Platform) -> None:
    def watch(merchant_id: str) -> Any:
        return platform.as_merchant(merchant_id).WatchDeliveries()

    def publishing(**claims: str) -> Any:
        token = platform.token("events:publish", **claims)
        return platform.events.StreamEvents(metadata=bearer(token))

    event = event_pb2.EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"{}")
    batch = event_service_pb2.StreamEventsRequest(sequence=1, events=[event])

    async def open_both(watching: Any, publisher: Any) -> None:
        await watching.read()
        await publisher.write(batch)
        await publisher.read()

    first, second = watch("m_1"), publishing(merchant_id="m_1")
    await open_both(first, second)
    for call in (watch("m_1"), publishing(merchant_id="m_1")):
        async with refused(StatusCode.RESOURCE_EXHAUSTED, "STREAMS_LIMIT") as error:
            await call.read()
        assert error.quota_subjects == ["merchant:m_1"]
        assert error.retry_after_seconds is None
    others = watch("m_2"), publishing()
    await open_both(*others)
    assert (await platform.publish()).event.id
    first.cancel()
    await until_admitted(lambda: watch("m_1").read())
    for stream in (second, *others):
        stream.cancel()
