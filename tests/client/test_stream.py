"""The client's StreamEvents transport: order, breaks, fallback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc.aio import Metadata

from postrider.v1 import event_service_pb2
from postrider_client import PostriderClient
from postrider_client.stream import StreamTransport
from postrider_client.transport import UnaryTransport
from tests.client.conftest import QUICK, client_of, event, token
from tests.support.event_service import FakeEventService, Refusal, serving

pb = event_service_pb2


async def publish(client: PostriderClient, count: int, **options: Any) -> list[str]:
    """Publish events in batches of one. Returns their ids."""
    async with client.publisher(linger_ms=0, max_batch=1, **options) as publisher:
        futures = [await publisher.publish(event()) for _ in range(count)]
        return [(await future).id for future in futures]


async def test_batches_share_a_stream_with_rising_numbers(
    client: PostriderClient, service: FakeEventService
) -> None:
    await publish(client, 50)
    assert service.calls == ["StreamEvents"]
    assert service.sequences == [list(range(1, 51))]


async def test_unacknowledged_batches_are_sent_again(
    client: PostriderClient, service: FakeEventService
) -> None:
    # Each of these streams breaks with a batch stored but not acknowledged.
    service.break_after.extend([1, 2, 3, 1])
    ids = await publish(client, 40)
    assert len(set(ids)) == 40
    assert len(service.stored) == 40
    assert len(service.sequences) == 5
    for broken, following in zip(service.sequences, service.sequences[1:], strict=False):
        assert following[0] in broken


async def test_unacknowledged_batches_are_limited_to_16(
    client: PostriderClient, service: FakeEventService
) -> None:
    seen: list[int] = []

    class Silent(FakeEventService):
        async def StreamEvents(  # noqa: N802
            self, request_iterator: AsyncIterator[Any], _context: Any
        ) -> AsyncIterator[Any]:
            held = []
            async for request in request_iterator:
                held.append(request)
                seen.append(request.sequence)
                # Acknowledges the first one at once, so that the client sends more.
                if len(held) < 16 and request.sequence > 1:
                    continue
                # After this round trip a seventeenth batch would have arrived.
                await client.events.GetEvent(pb.GetEventRequest(id="evt_1"))
                assert (len(seen) - 1) % 16 == 0
                for each in held:
                    yield pb.StreamEventsResponse(
                        sequence=each.sequence, results=self._store_all(each.events)
                    )
                held.clear()

    async with client_of(Silent()) as silent:
        await publish(silent, 33, max_in_flight=100)
    assert seen == list(range(1, 34))


async def test_server_without_streams_gets_unary_calls(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.stream_refusals.extend([Refusal(StatusCode.UNIMPLEMENTED)] * 100)
    assert len(set(await publish(client, 60, max_in_flight=1))) == 60
    # A failed write hides the reason sometimes, but not each time.
    assert service.calls.count("StreamEvents") <= 10
    assert service.calls.count("PublishEvents") == 60


async def test_next_batch_after_a_refusal_tries_a_stream(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.stream_refusals.append(Refusal(StatusCode.INVALID_ARGUMENT))
    async with client.publisher() as publisher:
        await (await publisher.publish(event()))
        await (await publisher.publish(event()))
    assert service.calls == ["StreamEvents", "PublishEvents", "StreamEvents"]


class Answering(FakeEventService):
    """Ends the first stream as given, and acknowledges properly on the next."""

    def __init__(self, ends: str) -> None:
        super().__init__()
        self.ends: str | None = ends

    async def StreamEvents(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        self.calls.append("StreamEvents")
        ends, self.ends = self.ends, None
        async for request in request_iterator:
            results = self._store_all(request.events)
            match ends:
                case "with OK":
                    return
                case "with CANCELLED":
                    await context.abort(StatusCode.CANCELLED, "draining")
                case "out of turn":
                    request.sequence += 1
                case "in part":
                    results = []
                case "in silence":
                    await asyncio.Event().wait()
            yield pb.StreamEventsResponse(sequence=request.sequence, results=results)


@pytest.mark.parametrize("ends", ["with OK", "with CANCELLED", "out of turn", "in part"])
async def test_ended_or_invalid_stream_is_replaced(ends: str) -> None:
    service = Answering(ends)
    async with client_of(service) as client:
        assert len(await publish(client, 3)) == 3
    assert len(service.stored) == 3
    assert service.calls.count("StreamEvents") == 2


async def test_silent_stream_is_replaced_after_a_timeout() -> None:
    service = Answering("in silence")
    async with client_of(service) as client:
        publisher = client.publisher(delivery_seconds=0.3)
        lost = await publisher.publish(event())
        with pytest.raises(ExceptionGroup):
            await publisher.flush()
        assert lost.exception() is not None
        assert (await (await publisher.publish(event()))).id
        await publisher.close()
    assert service.calls.count("StreamEvents") == 2


class SwallowingCall:
    """Behaves as gRPC when a refusal and the cancellation of the reader coincide.

    gRPC swallows the cancellation then, and the reader gets only the refusal.
    """

    def __init__(self) -> None:
        self.reading = asyncio.Event()

    def StreamEvents(self, _requests: Any) -> "SwallowingCall":  # noqa: N802
        return self

    def __aiter__(self) -> "SwallowingCall":
        return self

    async def __anext__(self) -> pb.StreamEventsResponse:
        self.reading.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise grpc.aio.AioRpcError(StatusCode.UNAVAILABLE, Metadata(), Metadata())

    def cancel(self) -> bool:
        return True


async def test_close_ends_when_grpc_swallows_a_cancellation() -> None:
    stub: Any = SwallowingCall()
    transport = StreamTransport(stub, UnaryTransport(stub), QUICK)
    sending = asyncio.create_task(transport.send([event()], 60))
    await stub.reading.wait()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    async with asyncio.timeout(5):
        await transport.close()


async def test_server_restart_under_load_stores_events_once(service: FakeEventService) -> None:
    async with AsyncExitStack() as stack:
        async with serving(service) as address:
            client = PostriderClient(address, token, tls=False, policy=QUICK)
            await stack.enter_async_context(client)
            publisher = client.publisher(linger_ms=0, max_batch=10)
            futures = [await publisher.publish(event()) for _ in range(200)]
            await futures[0]
        futures += [await publisher.publish(event()) for _ in range(200)]
        async with serving(service, address=address):
            await publisher.close()
            assert len({(await future).id for future in futures}) == 400
            assert len(service.stored) == 400
