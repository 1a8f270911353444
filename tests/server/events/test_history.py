"""GetEvent and ListEvents: what was accepted, without payloads, to whom it concerns alone."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from postrider.v1 import event_service_pb2 as pb
from postrider.v1.event_pb2 import Event
from server.events.store import EventFilter, list_events
from tests.support.platform import Metadata, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def of(platform: Platform, merchant_id: str) -> Metadata:
    return bearer(platform.token("events:publish", merchant_id=merchant_id))


def timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message


async def get(platform: Platform, event_id: str, metadata: Metadata | None = None) -> Event:
    response = await platform.events.GetEvent(
        pb.GetEventRequest(id=event_id), metadata=metadata or platform.producer()
    )
    return response.event


async def page(
    platform: Platform, metadata: Metadata | None = None, **fields: Any
) -> pb.ListEventsResponse:
    return await platform.events.ListEvents(
        pb.ListEventsRequest(**{"merchant_id": "m_1"} | fields),
        metadata=metadata or platform.producer(),
    )


async def insert_event(pool: Any, id_time: datetime, created_at: datetime) -> str:
    """An event whose id was made at one time and which the database accepted at another."""
    milliseconds = int(id_time.timestamp() * 1000)
    event_id = await pool.fetchval(
        "INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count, "
        "created_at) VALUES ((lpad(to_hex($1::bigint), 12, '0') || right(replace("
        "new_uuid7()::text, '-', ''), 20))::uuid, 'm_1', 'payment.succeeded', '', '', 0, $2) "
        "RETURNING id",
        milliseconds,
        created_at,
    )
    return f"evt_{event_id.hex}"


async def test_an_event_is_got_as_it_was_accepted(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    later = timestamp(datetime.now(UTC).replace(microsecond=0) + timedelta(days=1))
    published = (await platform.publish(not_before=later, ordering_key="pay_1")).event
    assert (published.not_before, published.ordering_key) == (later, "pay_1")
    assert await get(platform, published.id) == published
    assert published.delivery_count == 1
    assert not (await platform.publish()).event.HasField("not_before")


async def test_a_foreign_event_is_an_unknown_event(platform: Platform) -> None:
    event_id = (await platform.publish(merchant_id="m_2")).event.id
    assert (await get(platform, event_id, of(platform, "m_2"))).id == event_id
    messages = set()
    for text in (event_id, "evt_" + "0" * 32, event_id.upper(), "", "dlv_" + event_id[4:]):
        async with refused(StatusCode.NOT_FOUND, "EVENT_NOT_FOUND") as error:
            await get(platform, text, of(platform, "m_1"))
        messages.add(error.message.replace(repr(text), "ID"))
    assert len(messages) == 1


async def test_events_are_listed_newest_first_page_by_page(platform: Platform) -> None:
    accepted = [(await platform.publish(ordering_key="k" * n)).event for n in range(7)]
    await platform.publish(merchant_id="m_2")
    listed: list[Event] = []
    sizes, token = [], ""
    while True:
        response = await page(platform, page_size=3, page_token=token)
        listed += response.events
        sizes.append(len(response.events))
        if not (token := response.next_page_token):
            break
    assert listed == accepted[::-1]
    assert sizes == [3, 3, 1]


async def test_a_token_of_a_merchant_lists_its_events_and_sees_no_others(
    platform: Platform,
) -> None:
    mine = (await platform.publish(merchant_id="m_1")).event
    await platform.publish(merchant_id="m_2")
    for merchant_id in ("", "m_1"):
        response = await page(platform, of(platform, "m_1"), merchant_id=merchant_id)
        assert list(response.events) == [mine]
    foreign = await page(platform, of(platform, "m_1"), merchant_id="m_2")
    unknown = await page(platform, of(platform, "m_1"), merchant_id="m_nobody")
    assert foreign == unknown == pb.ListEventsResponse()


async def test_a_token_without_a_merchant_has_to_name_one(platform: Platform) -> None:
    for merchant_id in ("", "m 1", "\x00", "x" * 65):
        async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
            await page(platform, merchant_id=merchant_id)


async def test_events_are_filtered_by_type(platform: Platform) -> None:
    failed = (await platform.publish(type="payment.failed")).event
    await platform.publish()
    assert list((await page(platform, type="payment.failed")).events) == [failed]
    assert not (await page(platform, type="refund.created")).events
    for no_name in ("payment.*", "payment\x00"):
        async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_NAME_INVALID") as error:
            await page(platform, type=no_name)
        assert error.violations == {"type": "EVENT_TYPE_NAME_INVALID"}


async def test_a_time_range_holds_its_start_and_not_its_end_and_goes_by_the_create_time(
    platform: Platform, pool: Any
) -> None:
    second = timedelta(seconds=1)
    # Accepted some seconds before and after their ids were made, as clocks and waiting have it.
    early = await insert_event(pool, NOON + 20 * second, NOON - second)
    first = await insert_event(pool, NOON - 20 * second, NOON)
    late = await insert_event(pool, NOON - 10 * second, NOON + second)

    async def ids(**fields: Any) -> list[str]:
        return [event.id for event in (await page(platform, **fields)).events]

    assert await ids() == [early, late, first]
    assert await ids(start_time=timestamp(NOON)) == [late, first]
    assert await ids(end_time=timestamp(NOON)) == [early]
    assert await ids(start_time=timestamp(NOON), end_time=timestamp(NOON + second)) == [first]
    assert await ids(end_time=Timestamp()) == []
    assert await ids(start_time=Timestamp()) == [early, late, first]
    assert await ids(end_time=Timestamp(seconds=253402300799)) == [early, late, first]
    assert await ids(start_time=timestamp(NOON + timedelta(days=1))) == []


@pytest.mark.parametrize("field", ["start_time", "end_time"])
async def test_a_time_that_is_none_is_refused(platform: Platform, field: str) -> None:
    for wrong in (Timestamp(seconds=10**15), Timestamp(seconds=-1), Timestamp(nanos=-1)):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_INVALID") as error:
            await page(platform, None, **{field: wrong})
        assert error.violations == {field: "TIME_INVALID"}


async def test_a_time_range_that_holds_nothing_is_refused(platform: Platform) -> None:
    for end in (NOON, NOON - timedelta(seconds=1)):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_RANGE_EMPTY") as error:
            await page(platform, start_time=timestamp(NOON), end_time=timestamp(end))
        assert error.violations == {"end_time": "TIME_RANGE_EMPTY"}


async def test_a_page_token_is_good_for_its_own_list_only(platform: Platform) -> None:
    for _ in range(3):
        await platform.publish()
    token = (await page(platform, page_size=1)).next_page_token
    assert token
    now = timestamp(datetime.now(UTC))
    others: tuple[dict[str, Any], ...] = (
        {"merchant_id": "m_2"},
        {"type": "payment.failed"},
        {"start_time": now},
        {"end_time": now},
    )
    for other in others:
        async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
            await page(platform, page_token=token, **other)
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_SIZE_INVALID"):
        await page(platform, page_size=-1)


async def test_a_time_range_reads_its_part_of_the_merchants_index_only(
    platform: Platform, pool: Any
) -> None:
    await pool.execute(
        "INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count, "
        "created_at) SELECT (lpad(to_hex($1::bigint + n * 60000), 12, '0') || right(replace("
        "new_uuid7()::text, '-', ''), 20))::uuid, 'm_' || n % 1000, 'payment.succeeded', '', '', "
        "0, to_timestamp($1::bigint / 1000.0) + n * interval '1 minute' "
        "FROM generate_series(1, 20000) n",
        int(NOON.timestamp() * 1000),
    )
    await pool.execute("VACUUM ANALYZE events")
    middle = NOON + timedelta(minutes=10_000)
    later = middle + timedelta(minutes=10_000)
    response = await page(
        platform, page_size=100, start_time=timestamp(middle), end_time=timestamp(later)
    )
    assert len(response.events) == 10
    explained: Any = Explained(pool)
    await list_events(explained, "m_1", EventFilter(start=middle, end=later), 101)
    assert "Seq Scan" not in explained.plan
    assert "events_default_merchant_id_id_idx" in explained.plan, explained.plan
    rows = re.findall(r"Index Scan.*actual rows=(\d+)", explained.plan)
    assert sum(map(int, rows)) == 10


class Explained:
    """Stands for the pool, and has PostgreSQL run and explain what is fetched."""

    def __init__(self, pool: Any):
        self._pool = pool
        self.plan = ""

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        async with self._pool.acquire() as connection:
            # As everything of ours connects.
            await connection.execute("SET enable_seqscan = off")
            rows = await connection.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) {statement}", *arguments
            )
        self.plan = "\n".join(row[0] for row in rows)
        return []
