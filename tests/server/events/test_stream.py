"""StreamEvents: acknowledgements follow the commits in order; the rest may be sent again."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from postrider.v1 import event_service_pb2 as pb
from postrider.v1.event_pb2 import EventInput
from postrider.v1.event_service_pb2_grpc import EventServiceStub
from server.events.ingest import Ingest
from tests.support.factories import count_rows, locked, terminate_blocked, until_blocked
from tests.support.platform import Metadata, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import code_of

ACCEPTED = pb.PUBLISH_STATUS_ACCEPTED
DUPLICATE = pb.PUBLISH_STATUS_DUPLICATE


def batch(sequence: int, size: int = 3, **fields: Any) -> pb.StreamEventsRequest:
    """A batch whose idempotency keys are derived from its sequence."""
    return pb.StreamEventsRequest(
        sequence=sequence,
        events=[
            EventInput(
                **{
                    "merchant_id": "m_1",
                    "type": "payment.succeeded",
                    "payload_text": f"[{sequence}, {n}]",
                    "idempotency_key": f"{sequence}-{n}",
                    **fields,
                }
            )
            for n in range(size)
        ],
    )


def open_stream(platform: Platform, metadata: Metadata | None = None, **options: Any) -> Any:
    return platform.events.StreamEvents(metadata=metadata or platform.producer(), **options)


async def send(call: Any, request: pb.StreamEventsRequest) -> pb.StreamEventsResponse:
    """Send a batch and read its acknowledgement."""
    await call.write(request)
    response: pb.StreamEventsResponse = await call.read()
    assert response.sequence == request.sequence
    return response


async def acknowledged(call: Any) -> list[int]:
    """The sequences of the acknowledgements until the stream ends."""
    return [response.sequence async for response in responses(call)]


async def responses(call: Any) -> AsyncIterator[pb.StreamEventsResponse]:
    """The acknowledgements, while the test writes to the same call."""
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def until_committed(pool: Any, events: int) -> None:
    async with asyncio.timeout(10):
        while await count_rows(pool) < events:
            pass


async def test_batches_are_acknowledged_in_order(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    batches = [batch(n * 10, size=1 + n % 7) for n in range(50)]

    call: Any = platform.events.StreamEvents(iter(batches), metadata=platform.producer())
    acks = [response async for response in call]

    assert await call.code() is StatusCode.OK
    assert [response.sequence for response in acks] == [one.sequence for one in batches]
    stored = {f"evt_{r['id'].hex}": r["payload"] for r in await pool.fetch("TABLE events")}
    for one, response in zip(batches, acks, strict=True):
        assert {result.status for result in response.results} == {ACCEPTED}
        sent = [event.payload_text.encode() for event in one.events]
        assert [stored[result.event.id] for result in response.results] == sent
    assert (
        await count_rows(pool)
        == await count_rows(pool, "delivery_queue")
        == sum(len(one.events) for one in batches)
    )


async def test_acknowledged_batch_is_committed(platform: Platform, pool: Any) -> None:
    call = open_stream(platform)
    for sequence in (1, 2, 7):
        before = await count_rows(pool)
        await send(call, batch(sequence))
        assert await count_rows(pool) == before + 3
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is StatusCode.OK


async def test_empty_stream_ends_with_ok(platform: Platform) -> None:
    call = open_stream(platform)
    await call.done_writing()
    assert await acknowledged(call) == []
    assert await call.code() is StatusCode.OK


async def test_response_has_a_result_for_each_event(platform: Platform, pool: Any) -> None:
    call = open_stream(platform)
    mixed = batch(1, size=4)
    mixed.events[1].type = "no.such"
    mixed.events[2].idempotency_key = mixed.events[0].idempotency_key
    response = await send(call, mixed)
    assert [(result.status, result.reason) for result in response.results] == [
        (ACCEPTED, ""),
        (pb.PUBLISH_STATUS_REJECTED, "EVENT_TYPE_UNKNOWN"),
        (pb.PUBLISH_STATUS_REJECTED, "IDEMPOTENCY_KEY_REUSED"),
        (ACCEPTED, ""),
    ]
    assert "events[1].type" in response.results[1].message
    await send(call, batch(2))
    call.cancel()
    assert await count_rows(pool) == 5


async def test_at_most_16_batches_are_unacknowledged(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    taking = asyncio.Condition()
    may_commit = asyncio.Event()

    async def publish(_: Any, drafts: Any, *__: Any) -> list[Any]:
        async with taking:
            taken.append(len(drafts))
            taking.notify_all()
        await may_commit.wait()
        return []

    monkeypatch.setattr("server.events.ingest.Ingest.publish", publish)
    call = open_stream(platform)
    for sequence in range(40):
        await call.write(batch(sequence, size=1))
    async with asyncio.timeout(10), taking:
        await taking.wait_for(lambda: len(taken) >= 16)
    # During these calls the server could have read further batches.
    for _ in range(20):
        await platform.as_producer().ListEvents(merchant_id="m_1")
    assert len(taken) == 16
    may_commit.set()
    await call.done_writing()
    assert await acknowledged(call) == list(range(40))
    assert len(taken) == 40


async def test_waiting_batch_delays_later_acknowledgements(platform: Platform, pool: Any) -> None:
    await platform.publish(idempotency_key="0-0", payload="[0, 0]")
    call = open_stream(platform)
    async with pool.acquire() as other, other.transaction():
        # The first batch waits, because this transaction has inserted its key.
        await other.execute(
            "INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id) "
            "VALUES ('m_1', '1-0', '', new_uuid7())"
        )
        await call.write(batch(1, size=1))
        await until_blocked(pool)
        await call.write(batch(2, size=1))
        await until_committed(pool, 2)
        reading = asyncio.ensure_future(call.read())
        await platform.publish()
        assert not reading.done()
        await other.execute("DELETE FROM idempotency_keys WHERE key = '1-0'")
    assert (await reading).sequence == 1
    assert (await call.read()).sequence == 2
    call.cancel()


async def test_batches_with_ordering_keys_are_committed_in_turn(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, may_commit, begun = Ingest.publish, asyncio.Event(), []

    async def publish_later(ingest: Ingest, drafts: Any, *rest: Any) -> Any:
        begun.append(drafts[0].idempotency_key)
        if drafts[0].idempotency_key == "1-0":
            await may_commit.wait()
        return await publish(ingest, drafts, *rest)

    monkeypatch.setattr(Ingest, "publish", publish_later)
    call = open_stream(platform)
    for sequence in (1, 2, 3):
        await call.write(batch(sequence, size=1, ordering_key=f"k{sequence}"))
    await call.write(batch(4, size=1))
    await until_committed(pool, 1)
    assert begun == ["1-0", "4-0"]
    may_commit.set()
    await call.done_writing()
    assert await acknowledged(call) == [1, 2, 3, 4]
    assert begun == ["1-0", "4-0", "2-0", "3-0"]


async def test_failed_ordered_batch_stops_later_ordered_batches(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the failed batch, sent again, would follow batches that were sent after it."""
    publish, all_taken = Ingest.publish, asyncio.Event()

    async def publish_or_fail(ingest: Ingest, drafts: Any, *rest: Any) -> Any:
        if drafts[0].idempotency_key == "2-0":
            await all_taken.wait()
            raise TimeoutError("the database is slow")
        return await publish(ingest, drafts, *rest)

    monkeypatch.setattr(Ingest, "publish", publish_or_fail)
    call = open_stream(platform)
    for sequence in range(1, 6):
        await call.write(batch(sequence, size=1, ordering_key="k"))
    assert (await call.read()).sequence == 1
    # A batch without ordering keys is committed even if others fail.
    await call.write(batch(6, size=1))
    await until_committed(pool, 2)
    all_taken.set()
    async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
        await acknowledged(call)
    # Published with the same key, this event is committed after any batch still running.
    await platform.publish(idempotency_key="last", ordering_key="k")
    keys = await pool.fetch("SELECT key FROM idempotency_keys ORDER BY key")
    assert [row["key"] for row in keys] == ["1-0", "6-0", "last"]


@pytest.mark.parametrize("sequence", [4, 5, -1])
async def test_descending_sequence_ends_the_stream(
    platform: Platform, pool: Any, sequence: int
) -> None:
    sent = iter([batch(number) for number in (3, 5, sequence, 9)])
    call: Any = platform.events.StreamEvents(sent, metadata=platform.producer())
    acks = []
    async with refused(StatusCode.INVALID_ARGUMENT, "SEQUENCE_NOT_ASCENDING") as error:
        async for response in call:
            acks.append(response.sequence)  # noqa: PERF401 - the loop ends with an error
    assert acks == [3, 5]
    assert error.violations == {"sequence": "SEQUENCE_NOT_ASCENDING"}
    assert f"{sequence} after 5" in error.message
    assert await count_rows(pool) == 6


@pytest.mark.parametrize("size", [0, 1001])
async def test_batch_holds_1_to_1000_events(platform: Platform, pool: Any, size: int) -> None:
    call = open_stream(platform)
    assert len((await send(call, batch(1, size=1000))).results) == 1000
    await call.write(batch(2, size=size))
    async with refused(StatusCode.INVALID_ARGUMENT, "BATCH_SIZE"):
        await acknowledged(call)
    assert await count_rows(pool) == 1000


async def test_merchants_token_streams_only_for_its_merchant(platform: Platform, pool: Any) -> None:
    call = open_stream(platform, bearer(platform.token("events:publish", merchant_id="m_1")))
    await send(call, batch(1))
    foreign = batch(2)
    foreign.events[2].merchant_id = "m_2"
    await call.write(foreign)
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await acknowledged(call)
    assert await count_rows(pool) == 3


async def test_stream_ends_when_its_token_expires(platform: Platform, pool: Any) -> None:
    token = platform.token("events:publish", lifetime=timedelta(seconds=3))
    call = open_stream(platform, bearer(token))
    await send(call, batch(1))
    began = time.time()
    async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED") as error, asyncio.timeout(10):
        await acknowledged(call)
    assert time.time() - began < 5
    assert "unacknowledged" in error.message
    assert await count_rows(pool) == 3


async def until_refused(address: str) -> None:
    """Return when the server refuses new calls."""
    async with asyncio.timeout(10), grpc.aio.insecure_channel(address) as channel:
        stub = EventServiceStub(channel)
        while await code_of(stub.ListEvents(pb.ListEventsRequest())) is not StatusCode.UNAVAILABLE:
            pass


async def test_stopping_server_acknowledges_pending_batches(platform: Platform, pool: Any) -> None:
    call = open_stream(platform)
    async with locked(pool):
        await call.write(batch(1))
        await until_blocked(pool)
        platform.stop.set()
        await until_refused(platform.address)
    assert (await call.read()).sequence == 1
    async with refused(StatusCode.UNAVAILABLE, "SERVER_STOPPING") as error:
        await call.read()
    assert error.retry_after_seconds == 1
    assert await count_rows(pool) == 3


async def test_resent_stream_stores_each_event_once(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    batches = [batch(n, size=20) for n in range(60)]
    acked: list[int] = []
    for cut_after in (5, 23, None):
        async with grpc.aio.insecure_channel(platform.address) as channel:
            rest = [one for one in batches if one.sequence not in acked]
            call: Any = EventServiceStub(channel).StreamEvents(
                iter(rest), metadata=platform.producer()
            )
            async for response in call:
                assert {r.status for r in response.results} <= {ACCEPTED, DUPLICATE}
                acked.append(response.sequence)
                if len(acked) == cut_after:
                    # Closes the connection while batches are in flight.
                    break
    assert acked == list(range(60))
    assert await count_rows(pool) == await count_rows(pool, "delivery_queue") == 1200
    assert await pool.fetchval("SELECT count(DISTINCT payload) FROM events") == 1200


async def test_lost_database_connection_ends_the_stream(platform: Platform, pool: Any) -> None:
    call = open_stream(platform)
    await send(call, batch(1))
    async with locked(pool):
        await call.write(batch(2))
        await terminate_blocked(pool)
        async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
            await acknowledged(call)
    assert await count_rows(pool) == 3

    again = open_stream(platform)
    assert {result.status for result in (await send(again, batch(2))).results} == {ACCEPTED}
    again.cancel()


async def test_cancelled_stream_leaves_no_task(platform: Platform, pool: Any) -> None:
    call = open_stream(platform)
    await send(call, batch(1))
    call.cancel()
    await platform.publish()
    left = [task for task in asyncio.all_tasks() if "OrderedCommits" in repr(task.get_coro())]
    async with asyncio.timeout(5):
        await asyncio.gather(*left, return_exceptions=True)
    assert await count_rows(pool) == 4
