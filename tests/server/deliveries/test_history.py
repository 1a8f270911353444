"""ListDeliveries by type and time, details of attempts, and query plans on a long history."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from cli.dev.postgres import EmbeddedPostgres
from cli.ops.migrate import migrate
from core.ids import first_id_at, format_id, new_id
from core.lifecycle import DeliveryState
from postrider.v1 import delivery_pb2
from server.deliveries.store import DeliveryFilter, _page, list_deliveries
from tests.conftest import database_settings
from tests.support.factories import make_delivery, make_webhook_config
from tests.support.platform import Platform
from tests.support.query_plans import PLAN_MODES, planned_by
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def id_at(moment: datetime, tail: int = 7) -> UUID:
    """A delivery id made in this millisecond."""
    return UUID(int=first_id_at(moment).int + (7 << 76) + tail)


async def page(platform: Platform, **request: Any) -> Any:
    return await platform.as_merchant().ListDeliveries(**request)


async def listed(platform: Platform, **request: Any) -> list[str]:
    return [delivery.id for delivery in (await page(platform, **request)).deliveries]


async def finish(pool: Any, webhook_id: UUID, delivery_id: UUID, **overrides: Any) -> str:
    """Store a finished delivery. Returns its prefixed id."""
    row = {"state": "delivered", "event_type": "payment.succeeded", **overrides}
    await pool.execute(
        "INSERT INTO finished_deliveries (id, state, webhook_id, event_id, merchant_id,"
        " event_type, attempt_count, created_at) VALUES ($1, $2, $3, $1, 'm_1', $4, 1, now())",
        delivery_id,
        row["state"],
        webhook_id,
        row["event_type"],
    )
    return format_id("dlv", delivery_id)


async def test_list_filters_open_and_finished_by_event_type(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    wanted, expected = "refund.failed", []
    for state in ("ready", "parked"):
        made = await make_delivery(pool, webhook_id, state=state, event_type=wanted)
        expected.append(format_id("dlv", made))
        await make_delivery(pool, webhook_id, state=state)
    expected.append(await finish(pool, webhook_id, id_at(at(0)), event_type=wanted))
    await finish(pool, webhook_id, id_at(at(1)))
    found = await listed(platform, event_type=wanted)
    assert found == sorted(expected, reverse=True)
    assert await listed(platform, event_type="dispute.opened") == []


async def test_list_of_an_event_has_its_deliveries_of_every_open_state(
    platform: Platform, pool: Any
) -> None:
    event_id = new_id()
    one, other = [await make_webhook_config(pool, ordered=True) for _ in range(2)]
    deleted = await make_webhook_config(pool)
    await pool.execute("UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", deleted)
    foreign = await make_webhook_config(pool, merchant_id="m_other")
    states: dict[str, dict[str, Any]] = {state: {} for state in ("ready", "leased", "parked")}
    states["blocked"] = {"ordering_key": "k", "due_in": float("inf")}
    of_state: dict[str, list[str]] = {state: [] for state in states}
    position = itertools.count()
    for webhook_id in (one, other, deleted, foreign):
        for state, row in states.items():
            for event in (event_id, new_id()):
                if state == "blocked":
                    row["ordering_position"] = next(position)
                row_id = await make_delivery(pool, webhook_id, state=state, event_id=event, **row)
                if event == event_id and webhook_id in (one, other):
                    of_state[state].append(format_id("dlv", row_id))

    of_event = {"event_id": format_id("evt", event_id)}
    expected = sorted((made for of_one in of_state.values() for made in of_one), reverse=True)
    assert await listed(platform, **of_event) == expected
    for state, made in of_state.items():
        wanted = delivery_pb2.DeliveryState.Value(f"DELIVERY_STATE_{state.upper()}")
        assert await listed(platform, **of_event, state=wanted) == sorted(made, reverse=True)
    assert await listed(platform, **of_event, webhook_id=format_id("wh", one)) == sorted(
        (made[0] for made in of_state.values()), reverse=True
    )
    first = await page(platform, **of_event, page_size=3)
    rest = await page(platform, **of_event, page_size=9, page_token=first.next_page_token)
    assert [d.id for d in (*first.deliveries, *rest.deliveries)] == expected


async def test_list_time_range_includes_start_and_excludes_end(
    platform: Platform, pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    ids = [await finish(pool, webhook_id, id_at(at(n))) for n in range(4)]
    newest_first = ids[::-1]
    assert await listed(platform, start_time=at(1)) == newest_first[:3]
    assert await listed(platform, end_time=at(2)) == newest_first[2:]
    assert await listed(platform, start_time=at(1), end_time=at(3)) == [
        ids[2],
        ids[1],
    ]
    assert await listed(platform, start_time=at(1.001)) == newest_first[:2]
    assert await listed(platform, end_time=at(2.001)) == newest_first[1:]
    assert await listed(platform, start_time=at(4)) == []


async def test_adjacent_time_ranges_partition_deliveries(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    every = {await finish(pool, webhook_id, id_at(at(n / 1000), tail=n)) for n in range(9)}
    border = NOON + timedelta(microseconds=4567)
    before = await listed(platform, end_time=border)
    after = await listed(platform, start_time=border)
    assert (len(before), len(after)) == (4, 5)
    assert {*before, *after} == every


async def test_range_starting_at_create_time_includes_the_delivery(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    [delivery] = (await page(platform)).deliveries
    assert await listed(platform, start_time=delivery.create_time) == [delivery.id]
    assert await listed(platform, end_time=delivery.create_time) == []


async def test_page_token_requires_the_same_type_and_times(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for n in range(3):
        await finish(pool, webhook_id, id_at(at(n)))
    filters = {
        "event_type": "payment.succeeded",
        "start_time": at(0),
        "end_time": at(9),
    }
    first = await page(platform, page_size=2, **filters)
    rest = await page(platform, page_token=first.next_page_token, **filters)
    assert (len(first.deliveries), len(rest.deliveries)) == (2, 1)
    for name, other in (
        ("event_type", "refund.failed"),
        ("start_time", at(0.5)),
        ("end_time", at(8)),
    ):
        for changed in ({**filters, name: other}, {k: v for k, v in filters.items() if k != name}):
            async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
                await page(platform, page_token=first.next_page_token, **changed)


async def test_invalid_types_and_times_are_refused_by_field(platform: Platform) -> None:
    for request, reason in (
        ({"event_type": "\x00"}, "EVENT_TYPE_NAME_INVALID"),
        ({"event_type": "Payment"}, "EVENT_TYPE_NAME_INVALID"),
        ({"start_time": Timestamp(seconds=-1)}, "TIME_INVALID"),
        ({"end_time": Timestamp(seconds=10**15)}, "TIME_INVALID"),
        ({"start_time": Timestamp(nanos=-5)}, "TIME_INVALID"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
            await page(platform, **request)
        assert error.violations == dict.fromkeys(request, reason)
    for end in (at(0), at(-1)):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_RANGE_EMPTY") as error:
            await page(platform, start_time=at(0), end_time=end)
        assert error.violations == {"end_time": "TIME_RANGE_EMPTY"}
    # The latest timestamp of protobuf does not overflow.
    assert await listed(platform, start_time=Timestamp(seconds=253402300799)) == []


async def test_attempt_has_phase_times_address_and_response_excerpt(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    receiver.default = web.Response(body=b"no\x00 way", status=400)
    async with platform.engine(max_retries=0, max_in_flight_per_webhook=1):
        await platform.publish()
        await receiver.wait_for(1)
    [delivery] = (await page(platform)).deliveries
    [attempt] = delivery.attempts
    assert attempt.response_excerpt == r"no\x00 way"
    assert attempt.remote_address == "127.0.0.1"
    assert attempt.HasField("dns_duration")
    phases = (attempt.dns_duration, attempt.connect_duration, attempt.first_byte_duration)
    assert 0 < sum(p.ToNanoseconds() for p in phases) <= attempt.duration.ToNanoseconds()
    assert attempt.first_byte_duration.ToNanoseconds() > 0
    handshake = attempt.tls_duration.ToNanoseconds()
    assert 0 < handshake < attempt.connect_duration.ToNanoseconds()


async def test_attempt_without_response_leaves_its_fields_unset(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await pool.execute("UPDATE webhook_configs SET url = 'https://127.0.0.1:1/'")
    await platform.publish()
    async with platform.engine(max_retries=0):
        while not await pool.fetchval("SELECT count(*) FROM attempts"):
            pass
    [delivery] = (await page(platform)).deliveries
    [attempt] = delivery.attempts
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert attempt.outcome == delivery_pb2.OUTCOME_CONNECTION_ERROR
    assert (attempt.status_code, attempt.detail) == (0, "connection refused")
    assert attempt.HasField("connect_duration")
    assert not attempt.HasField("tls_duration")
    assert not attempt.HasField("first_byte_duration")
    assert (attempt.remote_address, attempt.response_excerpt) == ("127.0.0.1", "")


# One large merchant among many. 1 of 50 deliveries failed and 1 of 1,000 was cancelled.

_HISTORY = """
INSERT INTO webhook_configs
    (id, merchant_id, url, events, secret_ciphertext, secret_key_id)
SELECT ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid,
    CASE WHEN n <= 10 THEN 'm_1' ELSE 'm_' || n END, 'https://merchant.example/',
    '{payment.succeeded}', '', 'k1'
FROM generate_series(1, 100) n;

INSERT INTO finished_deliveries
    (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at)
SELECT (lpad(to_hex(1777982400000 + n * 1000), 12, '0') || '7000800000000000' ||
        lpad(to_hex(n), 4, '0'))::uuid,
    CASE WHEN n % 1000 = 7 THEN 'cancelled' WHEN n % 50 = 7 THEN 'failed' ELSE 'delivered' END,
    ('00000000-0000-7000-8000-' || lpad(w::text, 12, '0'))::uuid, new_uuid7(),
    CASE WHEN w <= 10 THEN 'm_1' ELSE 'm_' || w END,
    CASE WHEN n % 2500 = 3 THEN 'dispute.opened' WHEN n % 5 = 0 THEN 'payment.failed'
        ELSE 'payment.succeeded' END, 1, now()
FROM (SELECT n, CASE WHEN n % 2 = 1 THEN 1 + n / 2 % 10 ELSE 11 + n / 2 % 90 END AS w
    FROM generate_series(1, 50000) n) numbered;
"""
_FILTERS: dict[str, dict[str, Any]] = {
    "webhook_id": {"webhook_id": UUID("00000000-0000-7000-8000-000000000004")},
    "event_type": {"event_type": "dispute.opened"},
    "state": {"state": DeliveryState.FAILED},
    "cancelled": {"state": DeliveryState.CANCELLED},
    "times": {
        "start_at": datetime(2026, 5, 5, 20, tzinfo=UTC),
        "end_at": datetime(2026, 5, 5, 21, tzinfo=UTC),
    },
    "before": {"before": first_id_at(datetime(2026, 5, 5, 16, tzinfo=UTC))},
}
_COMBINATIONS = [
    names
    for count in range(len(_FILTERS) + 1)
    for names in itertools.combinations(_FILTERS, count)
    if not {"state", "cancelled"} <= set(names)
]


@pytest.fixture(scope="module")
async def history(postgres: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A connection to a database with 50,000 finished deliveries, analysed."""
    admin = await asyncpg.connect(postgres.url())
    await admin.execute("CREATE DATABASE delivery_history")
    url = postgres.url("delivery_history")
    await asyncio.to_thread(migrate, database_settings(url))
    # As the server and the engines connect.
    connection = await asyncpg.connect(url, server_settings={"enable_seqscan": "off"})
    await connection.execute(_HISTORY)
    await connection.execute("VACUUM ANALYZE")
    yield connection
    await connection.close()
    await admin.execute("DROP DATABASE delivery_history")
    await admin.close()


@pytest.mark.parametrize("names", _COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("mode", PLAN_MODES)
async def test_every_filter_combination_reads_few_rows(
    history: Any, names: tuple[str, ...], mode: str
) -> None:
    fields: dict[str, Any] = {}
    for name in names:
        fields |= _FILTERS[name]
    wanted = DeliveryFilter(**fields)
    planned = await planned_by(history, mode, *_page("m_1", wanted, 51))

    plan = await history.fetchval(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {planned}")

    kinds, read = _of_history(json.loads(plan)[0]["Plan"])
    assert "Seq Scan" not in kinds
    # The merchant has 25,000 deliveries, of which 1,000 are undelivered.
    assert read <= 1_100, plan
    found = [row.id for row in await list_deliveries(history, "m_1", wanted, 51)]
    assert found == await _by_brute_force(history, fields)


def _of_history(node: dict[str, Any]) -> tuple[set[str], float]:
    """The node types that read the history below a node, and the rows they read."""
    kinds, read = set(), 0.0
    if node.get("Relation Name", "").startswith("finished_deliveries"):
        kinds.add(node["Node Type"])
        read += node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
    for child in node.get("Plans", ()):
        more_kinds, more_read = _of_history(child)
        kinds |= more_kinds
        read += more_read
    return kinds, read


async def _by_brute_force(history: Any, fields: dict[str, Any]) -> list[UUID]:
    rows = await history.fetch("SELECT * FROM finished_deliveries WHERE merchant_id = 'm_1'")
    found = [
        row["id"]
        for row in rows
        if all(row[name] == fields[name] for name in ("webhook_id", "event_type") if name in fields)
        and row["state"] == fields.get("state", row["state"])
        and ("start_at" not in fields or row["id"] >= first_id_at(fields["start_at"]))
        and ("end_at" not in fields or row["id"] < first_id_at(fields["end_at"]))
        and ("before" not in fields or row["id"] < fields["before"])
    ]
    return sorted(found, reverse=True)[:51]


@pytest.mark.parametrize("state", [DeliveryState.FAILED, DeliveryState.CANCELLED])
async def test_undelivered_filter_uses_its_partial_index(
    history: Any, state: DeliveryState
) -> None:
    for mode in PLAN_MODES:
        planned = await planned_by(history, mode, *_page("m_1", DeliveryFilter(state=state), 51))
        plan = await history.fetch(f"EXPLAIN {planned}")
        assert any("finished_deliveries_default_merchant_id_id_idx1" in line[0] for line in plan)
