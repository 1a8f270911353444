"""GetEvent and ListEvents: accepted events without payloads, for the callers that may see them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from postrider.v1 import event_service_pb2 as pb
from postrider.v1.event_pb2 import Event
from server.events.store import EventFilter, list_events
from tests.support.platform import Calls, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
NO_TIMES = [Timestamp(seconds=10**15), Timestamp(seconds=-1), Timestamp(nanos=-1)]
#: Makes an id of the milliseconds in $1 + {}.
ID_AT = "(lpad(to_hex($1::bigint + {}), 12, '0') || right(replace(new_uuid7()::text, '-', ''), 20))"


def of_merchant(platform: Platform, merchant_id: str) -> Calls:
    return platform.calls(bearer(platform.token("events:publish", merchant_id=merchant_id)))


async def page(platform: Platform, **fields: Any) -> pb.ListEventsResponse:
    response: pb.ListEventsResponse
    response = await platform.as_producer().ListEvents(**{"merchant_id": "m_1"} | fields)
    return response


async def insert_event(pool: Any, id_time: datetime, created_at: datetime) -> str:
    """An event whose id has another time than the database gave it."""
    event_id = await pool.fetchval(
        "INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count, "  # noqa: S608
        f"created_at) VALUES ({ID_AT.format(0)}::uuid, 'm_1', 'payment.succeeded', '', '', 0, $2) "
        "RETURNING id",
        int(id_time.timestamp() * 1000),
        created_at,
    )
    return f"evt_{event_id.hex}"


async def test_get_returns_the_event_as_accepted(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    later = Timestamp()
    later.FromDatetime(datetime.now(UTC).replace(microsecond=0) + timedelta(days=1))
    published = (await platform.publish(not_before=later, ordering_key="pay_1")).event
    assert (published.not_before, published.ordering_key) == (later, "pay_1")
    assert (await platform.as_producer().GetEvent(id=published.id)).event == published
    assert published.delivery_count == 1
    assert not (await platform.publish()).event.HasField("not_before")


async def test_foreign_event_is_not_found(platform: Platform) -> None:
    event_id = (await platform.publish(merchant_id="m_2")).event.id
    assert (await of_merchant(platform, "m_2").GetEvent(id=event_id)).event.id == event_id
    messages = set()
    for text in (event_id, "evt_" + "0" * 32, event_id.upper(), "", "dlv_" + event_id[4:]):
        async with refused(StatusCode.NOT_FOUND, "EVENT_NOT_FOUND") as error:
            await of_merchant(platform, "m_1").GetEvent(id=text)
        messages.add(error.message.replace(repr(text), "ID"))
    assert len(messages) == 1


async def test_events_are_listed_newest_first_in_pages(platform: Platform) -> None:
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


async def test_merchants_token_lists_only_its_events(platform: Platform) -> None:
    own = (await platform.publish(merchant_id="m_1")).event
    await platform.publish(merchant_id="m_2")
    calls = of_merchant(platform, "m_1")
    for merchant_id in ("", "m_1"):
        assert list((await calls.ListEvents(merchant_id=merchant_id)).events) == [own]
    for merchant_id in ("m_2", "m_unknown"):
        assert await calls.ListEvents(merchant_id=merchant_id) == pb.ListEventsResponse()


async def test_events_are_filtered_by_type(platform: Platform) -> None:
    failed = (await platform.publish(type="payment.failed")).event
    await platform.publish()
    assert list((await page(platform, type="payment.failed")).events) == [failed]
    assert not (await page(platform, type="refund.created")).events


async def test_time_range_is_half_open_and_uses_create_time(platform: Platform, pool: Any) -> None:
    second = timedelta(seconds=1)
    # Clocks differ, so the times of the ids differ from the create times by some seconds.
    early = await insert_event(pool, NOON + 20 * second, NOON - second)
    first = await insert_event(pool, NOON - 20 * second, NOON)
    late = await insert_event(pool, NOON - 10 * second, NOON + second)

    async def ids(**fields: Any) -> list[str]:
        return [event.id for event in (await page(platform, **fields)).events]

    assert await ids() == [early, late, first]
    assert await ids(start_time=NOON) == [late, first]
    assert await ids(end_time=NOON) == [early]
    assert await ids(start_time=NOON, end_time=NOON + second) == [first]
    assert await ids(end_time=Timestamp()) == []
    assert await ids(start_time=Timestamp()) == [early, late, first]
    assert await ids(end_time=Timestamp(seconds=253402300799)) == [early, late, first]
    assert await ids(start_time=NOON + timedelta(days=1)) == []


INVALID: dict[tuple[str, str], list[Any]] = {
    ("merchant_id", "MERCHANT_ID_INVALID"): ["", "m 1", "\x00", "x" * 65],
    ("type", "EVENT_TYPE_NAME_INVALID"): ["payment.*", "payment\x00"],
    ("start_time", "TIME_INVALID"): NO_TIMES,
    ("end_time", "TIME_INVALID"): NO_TIMES,
    ("end_time", "TIME_RANGE_EMPTY"): [NOON, NOON - timedelta(seconds=1)],
    ("page_size", "PAGE_SIZE_INVALID"): [-1],
}


async def test_invalid_filter_is_refused(platform: Platform) -> None:
    for (field, reason), values in INVALID.items():
        start = {"start_time": NOON} if reason == "TIME_RANGE_EMPTY" else {}
        for value in values:
            async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
                await page(platform, **start, **{field: value})
            assert error.violations == {field: reason}


async def test_page_token_of_another_list_is_refused(platform: Platform) -> None:
    for _ in range(3):
        await platform.publish()
    token = (await page(platform, page_size=1)).next_page_token
    assert token
    others = {"merchant_id": "m_2", "type": "payment.failed", "start_time": NOON, "end_time": NOON}
    for field, value in others.items():
        async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
            await page(platform, page_token=token, **{field: value})


async def test_time_range_scans_only_its_part_of_the_index(platform: Platform, pool: Any) -> None:
    await pool.execute(
        "INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count, "  # noqa: S608
        f"created_at) SELECT {ID_AT.format('n * 60000')}::uuid, 'm_' || n % 1000, "
        "'payment.succeeded', '', '', 0, "
        "to_timestamp($1::bigint / 1000.0) + n * interval '1 minute' "
        "FROM generate_series(1, 20000) n",
        int(NOON.timestamp() * 1000),
    )
    await pool.execute("VACUUM ANALYZE events")
    middle = NOON + timedelta(minutes=10_000)
    later = middle + timedelta(minutes=10_000)
    response = await page(platform, page_size=100, start_time=middle, end_time=later)
    assert len(response.events) == 10
    explained: Any = Explained(pool)
    await list_events(explained, "m_1", EventFilter(start=middle, end=later), 101)
    assert "Seq Scan" not in explained.plan
    assert "events_default_merchant_id_id_idx" in explained.plan, explained.plan
    rows = re.findall(r"Index Scan.*actual rows=(\d+)", explained.plan)
    assert sum(map(int, rows)) == 10


class Explained:
    """A pool that keeps the plan of the last statement, executed with EXPLAIN ANALYZE."""

    def __init__(self, pool: Any):
        self._pool = pool
        self.plan = ""

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        async with self._pool.acquire() as connection:
            # The service's connections have this setting too.
            await connection.execute("SET enable_seqscan = off")
            rows = await connection.fetch(
                f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) {statement}", *arguments
            )
        self.plan = "\n".join(row[0] for row in rows)
        return []
