"""The publisher: batches, limits and results, with both transports."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from grpc import StatusCode

from postrider.v1 import event_service_pb2
from postrider.v1.event_pb2 import Event, EventInput
from postrider_client import EventRejected, PostriderClient, PublisherClosed, PublishFailed
from postrider_client.publisher import Publisher
from tests.client.conftest import UNAVAILABLE, event
from tests.support.event_service import FakeEventService, Refusal

pb = event_service_pb2


class HeldTransport:
    """Holds every batch until `gate` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.changed = asyncio.Condition()
        self.gate = asyncio.Event()
        self.closed = False

    async def send(
        self, batch: Sequence[EventInput], _seconds: float
    ) -> Sequence[pb.PublishResult]:
        async with self.changed:
            self.batches.append([event.idempotency_key for event in batch])
            self.changed.notify_all()
        await self.gate.wait()
        accepted = pb.PUBLISH_STATUS_ACCEPTED
        return [
            pb.PublishResult(status=accepted, event=Event(id=f"evt_{e.idempotency_key}"))
            for e in batch
        ]

    async def close(self) -> None:
        self.closed = True

    async def wait_for(self, batches: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: len(self.batches) >= batches)


@pytest.fixture
async def held() -> HeldTransport:
    return HeldTransport()


def refuse(service: FakeEventService, refusal: Refusal, calls: int) -> None:
    """Refuse the next calls, whether unary or streams."""
    service.refusals.extend([refusal] * calls)
    service.stream_refusals.extend([refusal] * calls)


@pytest.fixture(params=["unary", "stream"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "stream")


async def test_events_are_sent_in_batches(
    client: PostriderClient, service: FakeEventService, streaming: bool
) -> None:
    async with client.publisher(stream=streaming, linger_ms=50, max_batch=100) as publisher:
        futures = [await publisher.publish(event(f"k{n}")) for n in range(250)]
        results = await asyncio.gather(*futures)
    assert [result.id for result in results] == [service.stored[f"k{n}"] for n in range(250)]
    assert sorted(service.batches, reverse=True) == [100, 100, 50]
    assert ("StreamEvents" in service.calls) is streaming
    assert ("PublishEvents" in service.calls) is not streaming


async def test_single_event_is_sent_after_the_linger(held: HeldTransport) -> None:
    held.gate.set()
    publisher = Publisher(held, linger_ms=1)
    future = await publisher.publish(event("k"))
    assert (await asyncio.wait_for(future, 5)).id == "evt_k"
    await publisher.close()
    assert held.closed


async def test_flush_skips_the_linger(held: HeldTransport) -> None:
    held.gate.set()
    async with Publisher(held, linger_ms=1_000_000) as publisher:
        future = await publisher.publish(event("k"))
        await asyncio.wait_for(publisher.flush(), 5)
        assert future.done()


async def test_batches_in_flight_are_limited(held: HeldTransport) -> None:
    publisher = Publisher(held, linger_ms=0, max_batch=1, max_in_flight=2)
    for number in range(5):
        await publisher.publish(event(f"k{number}"))
    await held.wait_for(2)
    flushing = asyncio.create_task(publisher.flush())
    await asyncio.wait({flushing}, timeout=0.05)
    assert held.batches == [["k0"], ["k1"]]
    held.gate.set()
    await flushing
    assert sorted(held.batches) == [[f"k{number}"] for number in range(5)]
    await publisher.close()


async def test_ordered_batches_are_sent_one_at_a_time(held: HeldTransport) -> None:
    publisher = Publisher(held, linger_ms=0, max_batch=1, max_in_flight=8)
    for number in range(3):
        await publisher.publish(event(f"k{number}", ordering_key="pay_1"))
        await publisher.publish(event(f"free{number}"))
    await held.wait_for(4)
    flushing = asyncio.create_task(publisher.flush())
    await asyncio.wait({flushing}, timeout=0.05)
    assert held.batches == [["k0"], ["free0"], ["free1"], ["free2"]]
    held.gate.set()
    await flushing
    assert held.batches[4:] == [["k1"], ["k2"]]
    await publisher.close()


async def test_publish_waits_while_too_many_are_pending(held: HeldTransport) -> None:
    publisher = Publisher(held, linger_ms=0, max_pending=3)
    for number in range(3):
        await publisher.publish(event(f"k{number}"))
    fourth = asyncio.create_task(publisher.publish(event("k3")))
    await held.wait_for(1)
    assert not fourth.done()
    held.gate.set()
    await (await fourth)
    await publisher.close()


async def test_invalid_argument_takes_no_slot(held: HeldTransport) -> None:
    held.gate.set()
    no_event: Any = {"merchant_id": "m_1"}
    async with Publisher(held, max_pending=1) as publisher, asyncio.timeout(5):
        for _ in range(2):
            with pytest.raises(TypeError):
                await publisher.publish(no_event)
        await publisher.publish(event("a"))
    assert held.batches == [["a"]]


async def test_message_can_be_reused_at_once(held: HeldTransport) -> None:
    held.gate.set()
    async with Publisher(held, linger_ms=20) as publisher:
        message = event()
        for key in ("a", "b"):
            message.idempotency_key = key
            await publisher.publish(message)
    assert held.batches == [["a", "b"]]


async def test_large_batch_is_split_by_bytes(held: HeldTransport) -> None:
    held.gate.set()
    async with Publisher(held, linger_ms=20) as publisher:
        for number in range(10):
            big = event(f"k{number}")
            big.payload = bytes(1_000_000)
            await publisher.publish(big)
    assert [len(batch) for batch in held.batches] == [4, 4, 2]


async def test_rejected_event_fails_alone_and_in_close(
    client: PostriderClient, streaming: bool
) -> None:
    publisher = client.publisher(stream=streaming)
    good = await publisher.publish(event())
    bad = await publisher.publish(event(type="wrong.type"))
    with pytest.raises(ExceptionGroup, match="1 events were not published") as failed:
        await publisher.close()
    assert (await good).id == "evt_0"
    with pytest.raises(EventRejected, match="EVENT_TYPE") as rejected:
        await bad
    assert failed.value.exceptions == (rejected.value,)


async def test_error_is_raised_once(client: PostriderClient) -> None:
    async with client.publisher() as publisher:
        await publisher.publish(event(type="wrong.type"))
        with pytest.raises(ExceptionGroup):
            await publisher.flush()
        await publisher.publish(event())
        await publisher.flush()


async def test_outage_creates_no_duplicates(
    client: PostriderClient, service: FakeEventService, streaming: bool
) -> None:
    refuse(service, UNAVAILABLE, calls=5)
    async with client.publisher(stream=streaming, max_batch=10) as publisher:
        futures = [await publisher.publish(event()) for _ in range(35)]
    assert len({(await future).id for future in futures}) == 35
    assert len(service.stored) == 35


async def test_event_unsent_in_time_fails_with_its_key(
    client: PostriderClient, service: FakeEventService, streaming: bool
) -> None:
    refuse(service, UNAVAILABLE, calls=100_000)
    publisher = client.publisher(stream=streaming, delivery_seconds=0.3)
    future = await publisher.publish(event("pay_1"))
    with pytest.raises(ExceptionGroup):
        await publisher.close()
    with pytest.raises(PublishFailed, match="publish it again") as failed:
        await future
    assert failed.value.idempotency_key == "pay_1"


@pytest.mark.parametrize("ordering_key", ["", "pay_1"])
async def test_outage_fails_all_events_after_one_timeout(
    client: PostriderClient, service: FakeEventService, streaming: bool, ordering_key: str
) -> None:
    refuse(service, UNAVAILABLE, calls=100_000)
    publisher = client.publisher(
        stream=streaming, max_batch=1, max_in_flight=2, delivery_seconds=0.3
    )
    futures = [await publisher.publish(event(ordering_key=ordering_key)) for _ in range(40)]
    async with asyncio.timeout(2):
        with pytest.raises(ExceptionGroup, match="40 events"):
            await publisher.close()
    assert all(isinstance(future.exception(), PublishFailed) for future in futures)


async def test_refused_batch_fails_alone_with_its_error(
    client: PostriderClient, service: FakeEventService, streaming: bool
) -> None:
    refuse(service, Refusal(StatusCode.PERMISSION_DENIED), calls=1)
    publisher = client.publisher(stream=streaming, max_batch=1, max_in_flight=1)
    first, second = [await publisher.publish(event()) for _ in range(2)]
    with pytest.raises(ExceptionGroup, match="1 events"):
        await publisher.close()
    with pytest.raises(PublishFailed, match="PERMISSION_DENIED"):
        await first
    assert (await second).id


async def test_cancelled_future_does_not_stop_the_event(
    client: PostriderClient, service: FakeEventService
) -> None:
    async with client.publisher() as publisher:
        (await publisher.publish(event("k"))).cancel()
        await publisher.publish(event("l"))
    assert set(service.stored) == {"k", "l"}


async def test_publish_after_close_is_refused(client: PostriderClient) -> None:
    publisher = client.publisher()
    await publisher.close()
    with pytest.raises(PublisherClosed):
        await publisher.publish(event())


async def test_cancelled_close_fails_all_futures(held: HeldTransport) -> None:
    publisher = Publisher(held, linger_ms=0, max_batch=1, max_in_flight=1)
    futures = [await publisher.publish(event(f"k{number}")) for number in range(3)]
    await held.wait_for(1)
    closing = asyncio.create_task(publisher.close())
    await asyncio.wait({closing}, timeout=0.01)
    closing.cancel()
    await asyncio.wait({closing})
    for future in futures:
        with pytest.raises(PublishFailed):
            await future
    assert held.closed


async def test_close_cancelled_at_once_fails_all_futures(held: HeldTransport) -> None:
    publisher = Publisher(held, linger_ms=60_000)
    future = await publisher.publish(event("a"))
    closing = asyncio.create_task(publisher.close())
    # After one turn of the loop the batch is ready but its task has not started.
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    with pytest.raises(PublishFailed):
        await asyncio.wait_for(future, 5)
    assert held.batches == []
