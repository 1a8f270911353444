"""EventService: durable when OK, safe to repeat, and particular about what it takes."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from postrider.v1 import event_service_pb2 as pb
from postrider.v1.event_pb2 import EventInput
from server.events.store import EventWriter
from tests.support.platform import Metadata, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

KIB_256 = 256 * 1024


def event(**fields: Any) -> EventInput:
    """A valid event, but for what `fields` say."""
    if "payload" not in fields:
        fields.setdefault("payload_text", "{}")
    return EventInput(**{"merchant_id": "m_1", "type": "payment.succeeded"} | fields)


async def publish(
    platform: Platform, one: EventInput, metadata: Metadata | None = None
) -> pb.PublishEventResponse:
    return await platform.events.PublishEvent(
        pb.PublishEventRequest(event=one), metadata=metadata or platform.producer()
    )


async def publish_batch(
    platform: Platform, events: list[EventInput], metadata: Metadata | None = None
) -> list[pb.PublishResult]:
    answer = await platform.events.PublishEvents(
        pb.PublishEventsRequest(events=events), metadata=metadata or platform.producer()
    )
    return list(answer.results)


async def count(pool: Any, table: str) -> int:
    rows: int = await pool.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
    return rows


async def test_an_accepted_event_is_committed_with_its_deliveries(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    for merchant_id in ("m_1", "m_1", "m_2"):
        await platform.register(receiver.url, merchant_id)

    answer = await publish(platform, event(payload=b'{"amount": 1}'))

    assert not answer.duplicate
    assert answer.event.id.startswith("evt_")
    assert (answer.event.merchant_id, answer.event.type) == ("m_1", "payment.succeeded")
    assert answer.event.delivery_count == 2
    assert answer.event.HasField("create_time")
    row = await pool.fetchrow("SELECT * FROM events")
    assert f"evt_{row['id'].hex}" == answer.event.id
    assert (row["payload"], row["content_type"]) == (b'{"amount": 1}', "application/json")
    assert await count(pool, "delivery_queue") == 2


async def test_an_event_nobody_subscribed_to_is_accepted_for_no_delivery(
    platform: Platform, pool: Any
) -> None:
    assert (await publish(platform, event())).event.delivery_count == 0
    assert (await count(pool, "events"), await count(pool, "delivery_queue")) == (1, 0)


async def test_the_same_key_and_event_give_the_same_id_and_one_delivery(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    once = event(payload=b'{"n": 1}', idempotency_key="order-1")

    first, second = await publish(platform, once), await publish(platform, once)
    # Another way to say the same bytes and the default type.
    text = event(
        payload_text='{"n": 1}', content_type="application/json", idempotency_key="order-1"
    )
    third = await publish(platform, text)

    assert (first.duplicate, second.duplicate, third.duplicate) == (False, True, True)
    assert first.event == second.event == third.event
    assert (await count(pool, "events"), await count(pool, "delivery_queue")) == (1, 1)


async def test_a_key_used_for_another_event_is_refused_and_nothing_stored(
    platform: Platform, pool: Any
) -> None:
    await publish(platform, event(payload=b'{"n": 1}', idempotency_key="order-1"))
    for other in (
        event(payload=b'{"n": 2}', idempotency_key="order-1"),
        event(payload=b'{"n": 1}', idempotency_key="order-1", type="payment.failed"),
        event(payload=b'{"n": 1}', idempotency_key="order-1", content_type="text/plain"),
    ):
        async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED") as error:
            await publish(platform, other)
        assert "new key" in error.message
    assert await count(pool, "events") == 1


async def test_a_key_that_outlives_its_event_still_stands_for_it(
    platform: Platform, pool: Any
) -> None:
    later = Timestamp()
    later.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    fields: dict[str, Any] = {"idempotency_key": "k", "ordering_key": "o", "not_before": later}
    first = (await platform.publish(**fields)).event
    await pool.execute("DELETE FROM events")
    second = await platform.publish(**fields)
    assert second.duplicate
    first.create_time.CopyFrom(second.event.create_time)
    assert second.event == first
    async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"):
        await platform.publish('{"another": 1}', **fields)
    assert await pool.fetchval("SELECT count(*) FROM events") == 0


async def test_a_key_that_goes_while_it_is_looked_up_is_a_new_one(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = EventWriter._find_previous

    async def once_it_is_gone(*arguments: Any) -> Any:
        await pool.execute("DELETE FROM idempotency_keys")
        return await genuine(*arguments)

    first = (await platform.publish(idempotency_key="k")).event
    monkeypatch.setattr(EventWriter, "_find_previous", once_it_is_gone)
    batch = [event(idempotency_key=key) for key in ("k", "new")]
    answer = await platform.events.PublishEvents(
        pb.PublishEventsRequest(events=batch), metadata=platform.producer()
    )
    assert [result.status for result in answer.results] == [pb.PUBLISH_STATUS_ACCEPTED] * 2
    assert len({first.id, *(result.event.id for result in answer.results)}) == 3


async def test_idempotency_keys_are_each_merchants_own(platform: Platform, pool: Any) -> None:
    mine = await publish(platform, event(idempotency_key="order-1"))
    theirs = await publish(platform, event(idempotency_key="order-1", merchant_id="m_2"))
    assert not theirs.duplicate
    assert mine.event.id != theirs.event.id
    assert await count(pool, "events") == 2


async def test_without_a_key_every_call_makes_a_new_event(platform: Platform, pool: Any) -> None:
    assert (await publish(platform, event())).event.id != (
        await publish(platform, event())
    ).event.id
    assert await count(pool, "events") == 2


async def test_twenty_calls_at_once_with_one_key_make_one_event(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    once = event(idempotency_key="order-1")
    answers = await asyncio.gather(*(publish(platform, once) for _ in range(20)))
    assert len({answer.event.id for answer in answers}) == 1
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 19
    assert (await count(pool, "events"), await count(pool, "delivery_queue")) == (1, 1)


async def test_batches_that_share_keys_in_opposite_orders_all_come_through(
    platform: Platform, pool: Any
) -> None:
    events = [event(idempotency_key=f"order-{n}") for n in range(50)]
    batches = [events, events[::-1]] * 4
    answers = await asyncio.gather(*(publish_batch(platform, batch) for batch in batches))
    statuses = [result.status for results in answers for result in results]
    assert statuses.count(pb.PUBLISH_STATUS_ACCEPTED) == 50
    assert statuses.count(pb.PUBLISH_STATUS_DUPLICATE) == 350
    assert await count(pool, "events") == 50


async def test_a_key_has_at_most_128_printable_ascii_characters(platform: Platform) -> None:
    await publish(platform, event(idempotency_key="~ " * 64))
    for key in ("x" * 129, "tab\t", "nul\x00", "ü", "\u202e", "x" * 1_000_000):
        async with refused(StatusCode.INVALID_ARGUMENT, "IDEMPOTENCY_KEY_INVALID") as error:
            await publish(platform, event(idempotency_key=key))
        assert error.violations == {"event.idempotency_key": "IDEMPOTENCY_KEY_INVALID"}
        async with refused(StatusCode.INVALID_ARGUMENT, "ORDERING_KEY_INVALID") as error:
            await publish(platform, event(ordering_key=key))
        assert error.violations == {"event.ordering_key": "ORDERING_KEY_INVALID"}


async def test_an_ordering_key_is_kept_with_its_event(platform: Platform) -> None:
    accepted = await publish(platform, event(ordering_key="~ " * 64))
    assert accepted.event.ordering_key == "~ " * 64
    assert not (await publish(platform, event())).event.ordering_key
    mixed = await publish_batch(platform, [event(ordering_key="k"), event(), event(type="no.such")])
    assert [result.event.ordering_key for result in mixed] == ["k", "", ""]
    assert [result.reason for result in mixed] == ["", "", "EVENT_TYPE_UNKNOWN"]


async def test_a_payload_of_256_kib_is_taken_and_one_byte_more_refused(
    platform: Platform, pool: Any
) -> None:
    largest = b'"' + b"x" * (KIB_256 - 2) + b'"'
    await publish(platform, event(payload=largest))
    assert await pool.fetchval("SELECT payload FROM events") == largest
    async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_TOO_LARGE") as error:
        await publish(platform, event(payload=largest + b" "))
    assert error.violations == {"event.payload": "PAYLOAD_TOO_LARGE"}
    assert str(KIB_256) in error.message
    # Bytes count, not characters.
    async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_TOO_LARGE"):
        await publish(platform, event(payload_text='"' + "ü" * (KIB_256 // 2) + '"'))
    assert await count(pool, "events") == 1


async def test_the_largest_payload_is_the_operators_to_set(
    start_platform: Callable[..., Any],
) -> None:
    async with start_platform(max_payload_bytes=4) as platform:
        await publish(platform, event(payload=b"1234"))
        async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_TOO_LARGE"):
            await publish(platform, event(payload=b"12345"))


async def test_what_is_declared_json_must_be_json(platform: Platform, pool: Any) -> None:
    for content_type in (
        "",
        "application/json",
        "application/JSON; charset=utf-8",
        "application/a+json",
    ):
        for payload in (b"", b"{", b"{'a': 1}", b"NaN", b"\xff", b"[" * 100_000, b"\x00", b"{} {}"):
            async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_NOT_JSON") as error:
                await publish(platform, event(payload=payload, content_type=content_type))
            assert error.violations == {"event.payload": "PAYLOAD_NOT_JSON"}
    assert await count(pool, "events") == 0


async def test_json_that_some_parsers_take_is_refused_with_what_and_where(
    platform: Platform,
) -> None:
    for payload, fault in (
        (b'{"pan": 4111x}', "line 1 column 13"),
        (b"[1e400]", "infinity"),
        (b'"\\ud800"', "surrogate"),
        (b"[" * 1025 + b"]" * 1025, "depth"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_NOT_JSON") as error:
            await publish(platform, event(payload=payload))
        assert fault in error.message
        assert "4111" not in error.message


async def test_what_is_not_declared_json_may_be_any_bytes_and_arrives_unchanged(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    payload = bytes(range(256))
    await publish(platform, event(payload=payload, content_type="text/plain; charset=utf-8"))
    async with platform.engine():
        [received] = await receiver.wait_for(1)
    assert received.body == payload
    assert received.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_an_empty_payload_is_a_payload_where_json_is_not_declared(platform: Platform) -> None:
    await publish(platform, event(payload=b"", content_type="text/plain"))


async def test_a_content_type_that_is_no_media_type_is_refused(platform: Platform) -> None:
    for content_type in (
        "json",
        "text/plain\r\nX-Injected: 1",
        "text/plain; a=b",
        "text/plain\x00",
        "text/" + "x" * 200,
        "application/j\u017fon",
        "text/\u212aelvin",
        " text/plain",
        "text/plain\n",
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "CONTENT_TYPE_INVALID") as error:
            await publish(platform, event(content_type=content_type))
        assert error.violations == {"event.content_type": "CONTENT_TYPE_INVALID"}


async def test_every_wrong_field_of_an_event_is_named_at_once(
    platform: Platform, pool: Any
) -> None:
    wrong = EventInput(merchant_id="m 1", type="no.such", idempotency_key="ü", ordering_key="ü")
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID") as error:
        await publish(platform, wrong)
    assert error.violations == {
        "event.merchant_id": "MERCHANT_ID_INVALID",
        "event.type": "EVENT_TYPE_UNKNOWN",
        "event.idempotency_key": "IDEMPOTENCY_KEY_INVALID",
        "event.ordering_key": "ORDERING_KEY_INVALID",
        "event.payload": "PAYLOAD_MISSING",
    }
    assert "no.such" in error.message
    assert await count(pool, "events") == 0


async def test_an_empty_request_is_refused_and_not_an_accident(platform: Platform) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
        await platform.events.PublishEvent(pb.PublishEventRequest(), metadata=platform.producer())


async def test_a_token_of_a_merchant_publishes_for_that_merchant_only(
    platform: Platform, pool: Any
) -> None:
    of_m_1 = bearer(platform.token("events:publish", merchant_id="m_1"))
    await publish(platform, event(), of_m_1)
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await publish(platform, event(merchant_id="m_2"), of_m_1)
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await publish_batch(platform, [event(), event(merchant_id="m_2")], of_m_1)
    assert await count(pool, "events") == 1


async def test_a_batch_has_a_result_for_each_event_and_rejected_ones_stop_nobody(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await publish(platform, event(idempotency_key="old", payload_text="1"))

    results = await publish_batch(
        platform,
        [
            event(),
            event(type="no.such"),
            event(idempotency_key="old", payload_text="1"),
            event(idempotency_key="old", payload_text="2"),
            event(idempotency_key="new", payload_text="3"),
            event(idempotency_key="new", payload_text="3"),
            event(idempotency_key="new", payload_text="4"),
            event(payload_text="{"),
            EventInput(),
        ],
    )

    accepted, duplicate = pb.PUBLISH_STATUS_ACCEPTED, pb.PUBLISH_STATUS_DUPLICATE
    rejected = pb.PUBLISH_STATUS_REJECTED
    assert [(result.status, result.reason) for result in results] == [
        (accepted, ""),
        (rejected, "EVENT_TYPE_UNKNOWN"),
        (duplicate, ""),
        (rejected, "IDEMPOTENCY_KEY_REUSED"),
        (accepted, ""),
        (duplicate, ""),
        (rejected, "IDEMPOTENCY_KEY_REUSED"),
        (rejected, "PAYLOAD_NOT_JSON"),
        (rejected, "MERCHANT_ID_INVALID"),
    ]
    assert "events[1].type" in results[1].message
    assert results[4].event == results[5].event
    assert all(result.HasField("event") == (result.status != rejected) for result in results)
    assert (await count(pool, "events"), await count(pool, "delivery_queue")) == (3, 3)


async def test_a_batch_holds_1_to_1000_events(platform: Platform, pool: Any) -> None:
    results = await publish_batch(platform, [event(payload_text=str(n)) for n in range(1000)])
    assert {result.status for result in results} == {pb.PUBLISH_STATUS_ACCEPTED}
    ids = [result.event.id for result in results]
    rows = await pool.fetch("SELECT id, payload FROM events")
    payloads = {f"evt_{row['id'].hex}": row["payload"] for row in rows}
    assert [json.loads(payloads[event_id]) for event_id in ids] == list(range(1000))

    for events in ([], [event()] * 1001):
        async with refused(StatusCode.INVALID_ARGUMENT, "BATCH_SIZE") as error:
            await publish_batch(platform, events)
        assert error.violations == {"events": "BATCH_SIZE"}
    assert await count(pool, "events") == 1000


async def test_a_batch_of_rejected_events_only_is_an_answer(platform: Platform, pool: Any) -> None:
    results = await publish_batch(platform, [event(type="no.such")] * 1000)
    assert {result.reason for result in results} == {"EVENT_TYPE_UNKNOWN"}
    assert await count(pool, "events") == 0


async def test_a_time_for_delivery_is_kept_with_the_event_and_its_deliveries(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    accepted = await publish(platform, event(not_before=tomorrow))
    assert accepted.event.not_before.ToDatetime(UTC) == tomorrow
    assert await pool.fetchval("SELECT not_before FROM events") == tomorrow
    assert await pool.fetchval("SELECT due_at FROM delivery_queue") == tomorrow


async def test_a_time_for_delivery_that_is_past_means_at_once(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await publish(platform, event(not_before=datetime.now(UTC) - timedelta(days=400)))
    assert await pool.fetchval("SELECT due_at = created_at FROM delivery_queue")


async def test_a_time_for_delivery_is_at_most_30_days_ahead(platform: Platform, pool: Any) -> None:
    await publish(platform, event(not_before=datetime.now(UTC) + timedelta(days=29, hours=23)))
    for wrong in (
        datetime.now(UTC) + timedelta(days=30, minutes=1),
        Timestamp(seconds=10**15),
        Timestamp(seconds=-(10**15)),
        Timestamp(nanos=-1),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "NOT_BEFORE_INVALID") as error:
            await publish(platform, event(not_before=wrong))
        assert error.violations == {"event.not_before": "NOT_BEFORE_INVALID"}
    [result, _] = await publish_batch(platform, [event(not_before=wrong), event()])
    assert result.reason == "NOT_BEFORE_INVALID"
    assert await count(pool, "events") == 2


async def test_a_key_stands_for_its_time_of_delivery_too(platform: Platform, pool: Any) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    timed = event(idempotency_key="timed", not_before=tomorrow)
    first, again = await publish(platform, timed), await publish(platform, timed)
    assert again.duplicate
    assert again.event == first.event
    for other in (
        event(idempotency_key="timed"),
        event(idempotency_key="timed", not_before=tomorrow + timedelta(seconds=1)),
    ):
        async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"):
            await publish(platform, other)
    assert await count(pool, "events") == 1


async def test_a_key_stands_for_its_ordering_key_too(platform: Platform, pool: Any) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    kept = event(idempotency_key="kept", ordering_key="k", not_before=tomorrow)
    first, again = await publish(platform, kept), await publish(platform, kept)
    assert again.duplicate
    assert again.event == first.event
    assert first.event.ordering_key == "k"
    for other in (
        event(idempotency_key="kept"),
        event(idempotency_key="kept", ordering_key="k"),
        event(idempotency_key="kept", not_before=tomorrow),
        event(idempotency_key="kept", ordering_key="l", not_before=tomorrow),
    ):
        async with refused(StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"):
            await publish(platform, other)
    assert await count(pool, "events") == 1


async def test_keys_from_before_there_were_times_of_delivery_keep_their_meaning(
    platform: Platform, pool: Any
) -> None:
    await publish(platform, event(idempotency_key="old"))
    content = b"payment.succeeded\0application/json\0{}"
    stored = await pool.fetchval("SELECT content_hash FROM idempotency_keys")
    assert stored == hashlib.sha256(content).digest()
