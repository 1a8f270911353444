"""PublishEvent and PublishEvents: durable acceptance, idempotency keys, validation."""

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from postrider.v1 import event_service_pb2 as pb
from postrider.v1.event_pb2 import EventInput
from server.events.store import EventWriter
from tests.support.factories import count_rows
from tests.support.platform import Calls, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

KIB_256 = 256 * 1024


def event(**fields: Any) -> EventInput:
    """A valid event, except for `fields`."""
    if "payload" not in fields:
        fields.setdefault("payload_text", "{}")
    return EventInput(**{"merchant_id": "m_1", "type": "payment.succeeded"} | fields)


@pytest.fixture
def producer(platform: Platform) -> Calls:
    return platform.as_producer()


@pytest.fixture
async def subscribed(platform: Platform, receiver: Receiver) -> None:
    """A webhook config of m_1 that receives each event."""
    await platform.register(receiver.url)


async def publish(calls: Calls, **fields: Any) -> pb.PublishEventResponse:
    response: pb.PublishEventResponse = await calls.PublishEvent(event=event(**fields))
    return response


async def publish_batch(calls: Calls, events: list[EventInput]) -> list[pb.PublishResult]:
    return list((await calls.PublishEvents(events=events)).results)


async def assert_invalid(calls: Calls, field: str, reason: str, **fields: Any) -> str:
    """Publish an event with one invalid field. Returns the message of the refusal."""
    async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
        await publish(calls, **fields)
    assert error.violations == {f"event.{field}": reason}
    return error.message


async def test_accepted_event_is_committed_with_its_deliveries(
    platform: Platform, producer: Calls, receiver: Receiver, pool: Any
) -> None:
    for merchant_id in ("m_1", "m_1", "m_2"):
        await platform.register(receiver.url, merchant_id)

    answer = await publish(producer, payload=b'{"amount": 1}')

    assert not answer.duplicate
    assert answer.event.id.startswith("evt_")
    assert (answer.event.merchant_id, answer.event.type) == ("m_1", "payment.succeeded")
    assert answer.event.delivery_count == 2
    assert answer.event.HasField("create_time")
    row = await pool.fetchrow("SELECT * FROM events")
    assert f"evt_{row['id'].hex}" == answer.event.id
    assert (row["payload"], row["content_type"]) == (b'{"amount": 1}', "application/json")
    assert await count_rows(pool, "delivery_queue") == 2


async def test_event_without_subscriber_is_accepted(producer: Calls, pool: Any) -> None:
    assert (await publish(producer)).event.delivery_count == 0
    assert (await count_rows(pool), await count_rows(pool, "delivery_queue")) == (1, 0)


@pytest.mark.usefixtures("subscribed")
async def test_repeated_key_returns_the_first_event(producer: Calls, pool: Any) -> None:
    key = {"idempotency_key": "order-1"}
    first = await publish(producer, payload=b'{"n": 1}', **key)
    second = await publish(producer, payload=b'{"n": 1}', **key)
    # The same bytes and the default content type, in another form.
    third = await publish(producer, payload_text='{"n": 1}', content_type="application/json", **key)

    assert (first.duplicate, second.duplicate, third.duplicate) == (False, True, True)
    assert first.event == second.event == third.event
    assert (await count_rows(pool), await count_rows(pool, "delivery_queue")) == (1, 1)


TOMORROW = datetime.now(UTC) + timedelta(days=1)


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b'{"n": 2}'},
        {"type": "payment.failed"},
        {"content_type": "text/plain"},
        {"not_before": None},
        {"not_before": TOMORROW + timedelta(seconds=1)},
        {"ordering_key": ""},
        {"ordering_key": "l"},
        {"ordering_key": "", "not_before": None},
    ],
    ids=" and ".join,
)
async def test_key_of_another_event_is_refused(
    producer: Calls, pool: Any, change: dict[str, Any]
) -> None:
    fields = {"payload": b"1", "not_before": TOMORROW, "ordering_key": "k", "idempotency_key": "i"}
    first, again = await publish(producer, **fields), await publish(producer, **fields)
    assert again.duplicate
    assert again.event == first.event
    async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED") as error:
        await publish(producer, **fields | change)
    assert "new key" in error.message
    assert await count_rows(pool) == 1


async def test_key_outlives_its_event(platform: Platform, pool: Any) -> None:
    fields: dict[str, Any] = {"idempotency_key": "k", "ordering_key": "o", "not_before": TOMORROW}
    first = (await platform.publish(**fields)).event
    await pool.execute("DELETE FROM events")
    second = await platform.publish(**fields)
    assert second.duplicate
    first.create_time.CopyFrom(second.event.create_time)
    assert second.event == first
    async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"):
        await platform.publish('{"another": 1}', **fields)
    assert await count_rows(pool) == 0


async def test_key_deleted_during_its_lookup_is_new(
    producer: Calls, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_previous = EventWriter._find_previous

    async def delete_and_find(*arguments: Any) -> Any:
        await pool.execute("DELETE FROM idempotency_keys")
        return await find_previous(*arguments)

    first = (await publish(producer, idempotency_key="k")).event
    monkeypatch.setattr(EventWriter, "_find_previous", delete_and_find)
    results = await publish_batch(producer, [event(idempotency_key=key) for key in ("k", "new")])
    assert [result.status for result in results] == [pb.PUBLISH_STATUS_ACCEPTED] * 2
    assert len({first.id, *(result.event.id for result in results)}) == 3


@pytest.mark.parametrize(
    ("first", "second"),
    [({"idempotency_key": "k"}, {"idempotency_key": "k", "merchant_id": "m_2"}), ({}, {})],
    ids=["key of another merchant", "no key"],
)
async def test_event_without_used_key_is_new(
    producer: Calls, pool: Any, first: dict[str, str], second: dict[str, str]
) -> None:
    responses = [await publish(producer, **fields) for fields in (first, second)]
    assert not responses[1].duplicate
    assert responses[0].event.id != responses[1].event.id
    assert await count_rows(pool) == 2


@pytest.mark.usefixtures("subscribed")
async def test_concurrent_calls_with_one_key_create_one_event(producer: Calls, pool: Any) -> None:
    answers = await asyncio.gather(*(publish(producer, idempotency_key="k") for _ in range(20)))
    assert len({answer.event.id for answer in answers}) == 1
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 19
    assert (await count_rows(pool), await count_rows(pool, "delivery_queue")) == (1, 1)


async def test_batches_with_shared_keys_do_not_deadlock(producer: Calls, pool: Any) -> None:
    events = [event(idempotency_key=f"order-{n}") for n in range(50)]
    batches = [events, events[::-1]] * 4
    answers = await asyncio.gather(*(publish_batch(producer, batch) for batch in batches))
    statuses = [result.status for results in answers for result in results]
    assert statuses.count(pb.PUBLISH_STATUS_ACCEPTED) == 50
    assert statuses.count(pb.PUBLISH_STATUS_DUPLICATE) == 350
    assert await count_rows(pool) == 50


async def test_old_keys_keep_their_hash(producer: Calls, pool: Any) -> None:
    """Stored before events had a time of delivery, the keys must still match."""
    await publish(producer, idempotency_key="old")
    content = b"payment.succeeded\0application/json\0{}"
    stored = await pool.fetchval("SELECT content_hash FROM idempotency_keys")
    assert stored == hashlib.sha256(content).digest()


async def test_key_has_at_most_128_printable_ascii_characters(producer: Calls) -> None:
    await publish(producer, idempotency_key="~ " * 64)
    for key in ("x" * 129, "tab\t", "nul\x00", "ü", "\u202e", "x" * 1_000_000):
        for field in ("idempotency_key", "ordering_key"):
            await assert_invalid(producer, field, f"{field.upper()}_INVALID", **{field: key})


async def test_ordering_key_is_stored_with_its_event(producer: Calls) -> None:
    accepted = await publish(producer, ordering_key="~ " * 64)
    assert accepted.event.ordering_key == "~ " * 64
    assert not (await publish(producer)).event.ordering_key
    mixed = await publish_batch(producer, [event(ordering_key="k"), event(), event(type="no.such")])
    assert [result.event.ordering_key for result in mixed] == ["k", "", ""]
    assert [result.reason for result in mixed] == ["", "", "EVENT_TYPE_UNKNOWN"]


async def test_payload_has_at_most_256_kib(producer: Calls, pool: Any) -> None:
    largest = b'"' + b"x" * (KIB_256 - 2) + b'"'
    await publish(producer, payload=largest)
    assert await pool.fetchval("SELECT payload FROM events") == largest
    message = await assert_invalid(producer, "payload", "PAYLOAD_TOO_LARGE", payload=largest + b" ")
    assert str(KIB_256) in message
    # The limit counts bytes, not characters.
    text = '"' + "ü" * (KIB_256 // 2) + '"'
    await assert_invalid(producer, "payload", "PAYLOAD_TOO_LARGE", payload_text=text)
    assert await count_rows(pool) == 1


@pytest.mark.server(max_payload_bytes=4)
async def test_payload_limit_is_a_setting(platform: Platform) -> None:
    await publish(platform.as_producer(), payload=b"1234")
    async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_TOO_LARGE"):
        await publish(platform.as_producer(), payload=b"12345")


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "application/JSON; charset=utf-8", "application/a+json"],
)
async def test_json_content_type_requires_json(
    producer: Calls, pool: Any, content_type: str
) -> None:
    for payload in (b"", b"{", b"{'a': 1}", b"NaN", b"\xff", b"[" * 100_000, b"\x00", b"{} {}"):
        fields = {"payload": payload, "content_type": content_type}
        await assert_invalid(producer, "payload", "PAYLOAD_NOT_JSON", **fields)
    assert await count_rows(pool) == 0


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b'{"pan": 4111x}', "line 1 column 13"),
        (b"[1e400]", "infinity"),
        (b'"\\ud800"', "surrogate"),
        (b"[" * 1025 + b"]" * 1025, "depth"),
    ],
    ids=["syntax", "infinity", "surrogate", "depth"],
)
async def test_json_error_is_located_without_the_payload(
    producer: Calls, payload: bytes, error: str
) -> None:
    message = await assert_invalid(producer, "payload", "PAYLOAD_NOT_JSON", payload=payload)
    assert error in message
    assert "4111" not in message


@pytest.mark.usefixtures("subscribed")
async def test_other_content_types_take_any_bytes(
    platform: Platform, producer: Calls, receiver: Receiver
) -> None:
    payload = bytes(range(256))
    await publish(producer, payload=payload, content_type="text/plain; charset=utf-8")
    await publish(producer, payload=b"", content_type="text/plain")
    async with platform.engine():
        received = await receiver.wait_for(2)
    assert {request.body for request in received} == {payload, b""}
    assert "text/plain; charset=utf-8" in {each.headers["Content-Type"] for each in received}


@pytest.mark.parametrize(
    "content_type",
    [
        "json",
        "text/plain\r\nX-Injected: 1",
        "text/plain; a=b",
        "text/plain\x00",
        "text/" + "x" * 200,
        "application/j\u017fon",
        "text/\u212aelvin",
        " text/plain",
        "text/plain\n",
    ],
    ids=ascii,
)
async def test_invalid_content_type_is_refused(producer: Calls, content_type: str) -> None:
    fields = {"content_type": content_type}
    await assert_invalid(producer, "content_type", "CONTENT_TYPE_INVALID", **fields)


async def test_all_invalid_fields_are_reported(producer: Calls, pool: Any) -> None:
    invalid = EventInput(merchant_id="m 1", type="no.such", idempotency_key="ü", ordering_key="ü")
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID") as error:
        await producer.PublishEvent(event=invalid)
    assert error.violations == {
        "event.merchant_id": "MERCHANT_ID_INVALID",
        "event.type": "EVENT_TYPE_UNKNOWN",
        "event.idempotency_key": "IDEMPOTENCY_KEY_INVALID",
        "event.ordering_key": "ORDERING_KEY_INVALID",
        "event.payload": "PAYLOAD_MISSING",
    }
    assert "no.such" in error.message
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
        await producer.PublishEvent()
    assert await count_rows(pool) == 0


async def test_merchants_token_publishes_only_for_its_merchant(
    platform: Platform, pool: Any
) -> None:
    calls = platform.calls(bearer(platform.token("events:publish", merchant_id="m_1")))
    await publish(calls)
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await publish(calls, merchant_id="m_2")
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await publish_batch(calls, [event(), event(merchant_id="m_2")])
    assert await count_rows(pool) == 1


@pytest.mark.usefixtures("subscribed")
async def test_batch_has_a_result_for_each_event(producer: Calls, pool: Any) -> None:
    await publish(producer, idempotency_key="old", payload_text="1")
    accepted, duplicate = pb.PUBLISH_STATUS_ACCEPTED, pb.PUBLISH_STATUS_DUPLICATE
    rejected = pb.PUBLISH_STATUS_REJECTED
    cases = [
        (event(), (accepted, "")),
        (event(type="no.such"), (rejected, "EVENT_TYPE_UNKNOWN")),
        (event(idempotency_key="old", payload_text="1"), (duplicate, "")),
        (event(idempotency_key="old", payload_text="2"), (rejected, "IDEMPOTENCY_KEY_REUSED")),
        (event(idempotency_key="new", payload_text="3"), (accepted, "")),
        (event(idempotency_key="new", payload_text="3"), (duplicate, "")),
        (event(idempotency_key="new", payload_text="4"), (rejected, "IDEMPOTENCY_KEY_REUSED")),
        (event(payload_text="{"), (rejected, "PAYLOAD_NOT_JSON")),
        (EventInput(), (rejected, "MERCHANT_ID_INVALID")),
    ]

    results = await publish_batch(producer, [event for event, _ in cases])

    assert [(result.status, result.reason) for result in results] == [
        expected for _, expected in cases
    ]
    assert "events[1].type" in results[1].message
    assert results[4].event == results[5].event
    assert all(result.HasField("event") == (result.status != rejected) for result in results)
    assert (await count_rows(pool), await count_rows(pool, "delivery_queue")) == (3, 3)


async def test_batch_holds_1_to_1000_events(producer: Calls, pool: Any) -> None:
    results = await publish_batch(producer, [event(payload_text=str(n)) for n in range(1000)])
    assert {result.status for result in results} == {pb.PUBLISH_STATUS_ACCEPTED}
    ids = [result.event.id for result in results]
    rows = await pool.fetch("SELECT id, payload FROM events")
    payloads = {f"evt_{row['id'].hex}": row["payload"] for row in rows}
    assert [json.loads(payloads[event_id]) for event_id in ids] == list(range(1000))

    for events in ([], [event()] * 1001):
        async with refused(StatusCode.INVALID_ARGUMENT, "BATCH_SIZE") as error:
            await publish_batch(producer, events)
        assert error.violations == {"events": "BATCH_SIZE"}
    assert await count_rows(pool) == 1000


async def test_batch_of_1000_rejected_events_is_answered(producer: Calls, pool: Any) -> None:
    results = await publish_batch(producer, [event(type="no.such")] * 1000)
    assert {result.reason for result in results} == {"EVENT_TYPE_UNKNOWN"}
    assert await count_rows(pool) == 0


@pytest.mark.usefixtures("subscribed")
async def test_not_before_is_the_due_time_of_deliveries(producer: Calls, pool: Any) -> None:
    tomorrow = TOMORROW.replace(microsecond=0)
    accepted = await publish(producer, not_before=tomorrow)
    assert accepted.event.not_before.ToDatetime(UTC) == tomorrow
    assert await pool.fetchval("SELECT not_before FROM events") == tomorrow
    assert await pool.fetchval("SELECT due_at FROM delivery_queue") == tomorrow


@pytest.mark.usefixtures("subscribed")
async def test_past_not_before_means_now(producer: Calls, pool: Any) -> None:
    await publish(producer, not_before=datetime.now(UTC) - timedelta(days=400))
    assert await pool.fetchval("SELECT due_at = created_at FROM delivery_queue")


async def test_not_before_is_at_most_30_days_ahead(producer: Calls, pool: Any) -> None:
    await publish(producer, not_before=datetime.now(UTC) + timedelta(days=29, hours=23))
    for invalid in (
        datetime.now(UTC) + timedelta(days=30, minutes=1),
        Timestamp(seconds=10**15),
        Timestamp(seconds=-(10**15)),
        Timestamp(nanos=-1),
    ):
        await assert_invalid(producer, "not_before", "NOT_BEFORE_INVALID", not_before=invalid)
    [result, _] = await publish_batch(producer, [event(not_before=invalid), event()])
    assert result.reason == "NOT_BEFORE_INVALID"
    assert await count_rows(pool) == 2
