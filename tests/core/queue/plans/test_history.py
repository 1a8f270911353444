"""Plans of the history, the audit log, erasure and retention."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.dialects import postgresql

from core.ids import first_id_at
from core.lifecycle import Outcome
from core.postgres.planner import equal
from core.queue import open_ranges, redelivery
from core.retention import move, partitions, prune
from server.admin import audit_log, erasure
from server.deliveries import store as delivery_store
from server.events import store as event_store
from tests.support.factories import STARTED_AT
from tests.support.query_plans import explain


async def test_finished_deliveries_and_attempts_are_read_by_key(crowded: Any) -> None:
    ids = await crowded.fetchval(
        "SELECT array_agg(id) FROM (SELECT id FROM finished_deliveries LIMIT 50) f"
    )

    finished = await explain(crowded, "SELECT * FROM finished_deliveries WHERE id = ANY ($1)", ids)
    attempts = await explain(
        crowded, "SELECT * FROM attempts WHERE delivery_id = ANY ($1) ORDER BY number", ids
    )

    assert finished.index_scan("finished_deliveries_day_pkey").rows == 50
    assert (finished.days_entered("finished_deliveries"), attempts.days_entered("attempts")) == (
        1,
        1,
    )
    assert attempts.index_scan("attempts_day_pkey").rows == 50


@pytest.mark.parametrize(
    ("column", "index"),
    [
        ("webhook_id", "finished_deliveries_day_webhook_id_id_idx"),
        ("event_id", "finished_deliveries_day_event_id_idx"),
    ],
)
async def test_history_page_is_read_in_index_order(crowded: Any, column: str, index: str) -> None:
    value = await crowded.fetchval(f"SELECT {column} FROM finished_deliveries LIMIT 1")  # noqa: S608

    page = f"SELECT * FROM finished_deliveries WHERE {column} = $1 ORDER BY id DESC LIMIT 50"  # noqa: S608
    plan = await explain(crowded, page, value)

    assert plan.index_scan(index).rows <= 50


@pytest.mark.parametrize("merchant_id", [None, "m_1"])
async def test_redelivery_page_reads_only_that_page(crowded: Any, merchant_id: str | None) -> None:
    transaction = crowded.transaction()
    await transaction.start()
    await crowded.execute("""
        UPDATE finished_deliveries SET state = 'failed'
        WHERE id::text ~ '[0-1]$' OR merchant_id = 'm_1';
        INSERT INTO delivery_queue
            (id, webhook_id, event_id, merchant_id, event_type, state, redelivery_of)
        SELECT new_uuid7(), webhook_id, event_id, merchant_id, event_type, 'ready', id
        FROM finished_deliveries WHERE state = 'failed' AND id::text ~ '0$';
        ANALYZE finished_deliveries; ANALYZE delivery_queue
    """)
    wanted = redelivery.FailedFilter(
        STARTED_AT, STARTED_AT.replace(year=2100), merchant_id, outcomes=[Outcome.SUCCEEDED]
    )
    of_merchant = " AND f.merchant_id = $8" if merchant_id else ""
    statement = redelivery._CLASSIFY.format(
        of_merchant=of_merchant, lock="FOR KEY SHARE OF f", made=redelivery._MAKE
    )
    plan = await explain(
        crowded, statement, *redelivery._arguments(wanted, redelivery.BEGINNING, 100)
    )
    await transaction.rollback()

    page = plan.index_scan("finished_deliveries_day_merchant_id_id_idx1")
    assert (0 < page.rows <= 100, page.filtered) == (True, 0)
    assert plan.index_scan("delivery_queue_redeliveries").rows <= 500
    for index in ("events_day_pkey", "attempts_day_pkey"):
        assert plan.index_scan(index).rows <= 100, plan.scans


async def test_delivery_page_reads_one_page_per_state(crowded: Any) -> None:
    statement, arguments = delivery_store._page("m_1", delivery_store.DeliveryFilter(), 51)

    plan = await explain(crowded, statement, *arguments)

    for index in ("delivery_queue_parked", "delivery_queue_blocked_of_webhook"):
        assert plan.index_scan(index).rows <= 2 * 51
    assert plan.index_scan("delivery_queue_of_webhook").rows <= 2 * 50


async def test_time_filter_enters_only_matching_days(crowded: Any) -> None:
    now = datetime.now(UTC)
    times = delivery_store.DeliveryFilter(start_at=now - timedelta(days=2), end_at=now)
    statement, arguments = delivery_store._page("m_1", times, 51)
    listed = await explain(crowded, statement, *arguments)
    wanted = event_store.EventFilter(start=now - timedelta(days=2), end=now)
    statement, arguments = event_store._page("m_1", wanted, 51)
    events = await explain(crowded, statement, *arguments)

    assert listed.days_entered("finished_deliveries") == 3
    assert 3 <= events.days_entered("events") <= 4


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        ("NOT active", "webhook_configs_inactive"),
        ("NOT active AND deactivation_reason = 'failures'", "webhook_configs_inactive"),
        ("merchant_id = 'm_7'", "webhook_configs_of_merchant"),
        ("true", "webhook_configs_pkey"),
    ],
)
async def test_config_page_is_read_in_index_order(crowded: Any, condition: str, index: str) -> None:
    plan = await explain(
        crowded,
        f"SELECT * FROM webhook_configs WHERE deleted_at IS NULL AND {condition}"  # noqa: S608
        " ORDER BY id DESC LIMIT 51",
    )
    assert plan.index_scan(index).rows <= 51


@pytest.mark.parametrize("statement", ["_ERASE_EVENTS", "_ERASE_ATTEMPTS"])
async def test_erasure_chunk_reads_only_the_rows_it_erases(crowded: Any, statement: str) -> None:
    end = datetime(9999, 1, 1, tzinfo=UTC)
    plan = await explain(crowded, getattr(erasure, statement), "m_1", UUID(int=0), 50, end)

    assert max(scan.rows for scan in plan.scans) <= 50
    assert max(scan.filtered for scan in plan.scans) <= 50


async def test_erasure_reads_only_audit_entries_of_its_merchant(crowded: Any) -> None:
    end = datetime(9999, 1, 1, tzinfo=UTC)
    actions = list(erasure._OPERATORS_ACTIONS)
    plan = await explain(crowded, erasure._ERASE_ENTRIES, "m_7", UUID(int=0), 50, end, actions)

    assert plan.index_scan("audit_entries_of_merchant").rows == 40


@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({}, "audit_entries_pkey"),
        ({"actor": "actor 7"}, "audit_entries_of_actor"),
        ({"resource": "resource 7"}, "audit_entries_of_resource"),
    ],
)
@pytest.mark.parametrize("bounded", [False, True])
async def test_audit_log_page_is_read_in_index_order(
    crowded: Any, fields: dict[str, str], index: str, bounded: bool
) -> None:
    end = datetime.now(UTC) - timedelta(days=50)
    start = end - timedelta(days=60)
    wanted = audit_log.AuditFilter(
        actor=fields.get("actor", ""),
        resource=fields.get("resource", ""),
        start=start if bounded else None,
        end=end if bounded else None,
        before=None,
    )
    dialect: Any = postgresql
    page = audit_log._page(wanted, 51).compile(
        dialect=dialect.dialect(), compile_kwargs={"literal_binds": True}
    )

    plan = await explain(crowded, str(page))

    scan = plan.index_scan(index)
    # The range of ids is one day longer than the range of times, and a day has 96 entries.
    assert scan.rows <= 100
    assert scan.filtered <= (100 if bounded else 0)


async def test_expired_keys_and_audit_entries_are_read_by_time(crowded: Any) -> None:
    before = datetime.now(UTC) - timedelta(days=1)
    keys = await explain(crowded, prune._DELETE_KEYS, before, 100)
    bound = first_id_at(before + timedelta(days=1))
    entries = await explain(crowded, prune._DELETE_AUDIT_ENTRIES, before, 100, bound)

    assert keys.index_scan("idempotency_keys_created_at").rows == 100
    assert entries.index_scan("audit_entries_pkey").rows == 100


@pytest.mark.parametrize("dry", [False, True])
async def test_retention_page_reads_only_that_page(crowded: Any, dry: bool) -> None:
    today = await partitions.today(crowded)
    end = datetime(9999, 1, 1, tzinfo=UTC)
    last = UUID(int=(1 << 128) - 1)
    partition, first = today.partition("finished_deliveries"), UUID(int=0)
    await crowded.execute(prune._CREATE_OPEN_EVENTS)
    change = "" if dry else move._MOVE_FINISHED
    statement = move._FINISHED.format(partition=partition, change=change)
    plans = [await explain(crowded, statement, first, last, 100, end)]
    change = "" if dry else prune._DELETE_FINISHED.format(partition=partition)
    statement = prune._FINISHED.format(partition=partition, change=change)
    plans += [await explain(crowded, statement, first, last, 100, end, end)]
    partition = today.partition("events")
    statement = prune._EVENTS.format(partition=partition, same_id=equal("e.id", "m.id"))
    plans += [await explain(crowded, statement, first, last, 100, end)]
    plans += [await explain(crowded, move._NEEDED_EVENTS, first, last, 100)]
    plans += [await explain(crowded, open_ranges._EVENTS, first, last, 100)]
    plans += [await explain(crowded, open_ranges._OPEN, first, last, 100)]

    for plan in plans:
        # The index by event reads slightly more than the 100 rows of a page.
        assert max(s.rows + s.filtered for s in plan.scans if s.kind != "CTE Scan") <= 300, plan
