"""The retention rule: the rows that a run keeps and removes."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core import queue, retention
from core.operator_audit import Operator
from core.settings import RetentionSettings
from tests.conftest import database_settings
from tests.support.factories import make_webhook_config
from tests.support.past_rows import (
    day_of,
    id_of,
    make_days,
    past_attempt,
    past_delivery,
    past_event,
    past_pending,
)
from tests.support.retention import SETTINGS, assert_sound, ids, partition_of, run_retention


async def test_delivered_deliveries_are_dropped_with_their_day(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 20)
    await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    cancelled, cancelled_event = await past_delivery(pool, webhook_id, 40, "cancelled")
    late, late_event = await past_delivery(pool, webhook_id, 40, ended_days_ago=5)
    young, young_event = await past_delivery(pool, webhook_id, 20)
    pending, pending_event = await past_pending(pool, webhook_id, 40, attempt_count=1)
    await past_attempt(pool, pending, "timeout")
    await past_event(pool, 40, delivery_count=0)

    report = await run_retention(database_url)

    tables = ("finished_deliveries", "attempts", "events")
    assert report.days_dropped == [day_of(40).partition(table) for table in tables]
    assert await ids(pool, "finished_deliveries") == {failed, cancelled, late, young}
    assert await ids(pool, "attempts", "delivery_id") == {failed, late, young, pending}
    kept_events = {failed_event, cancelled_event, late_event, young_event, pending_event}
    assert await ids(pool, "events") == kept_events
    assert await partition_of(pool, "events", pending_event) == "events_kept"
    assert (report.deliveries_kept, report.events_kept) == (3, 4)
    await assert_sound(pool)


async def test_kept_rows_are_removed_at_their_own_age(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 100, 80)
    await past_delivery(pool, webhook_id, 100, "failed")
    failed, failed_event = await past_delivery(pool, webhook_id, 80, "failed")
    late, late_event = await past_delivery(pool, webhook_id, 100, "failed", ended_days_ago=80)
    _, pending_event = await past_pending(pool, webhook_id, 100)

    for _ in range(2):
        await run_retention(database_url)
        assert await ids(pool, "finished_deliveries") == {failed, late}
        assert await ids(pool, "attempts", "delivery_id") == {failed, late}
        assert await ids(pool, "events") == {failed_event, late_event, pending_event}
    await assert_sound(pool)


async def test_rows_without_a_day_follow_the_same_rule(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    old, _ = await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    _, pending_event = await past_pending(pool, webhook_id, 200)
    young, young_event = await past_delivery(pool, webhook_id, 29)
    assert await partition_of(pool, "finished_deliveries", old) == "finished_deliveries_default"

    report = await run_retention(database_url)

    assert (report.deliveries_removed, report.events_removed) == (1, 1)
    assert await ids(pool, "finished_deliveries") == {failed, young}
    assert await ids(pool, "attempts", "delivery_id") == {failed, young}
    assert await ids(pool, "events") == {failed_event, pending_event, young_event}
    await assert_sound(pool)


async def test_redelivery_keeps_its_event(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 35, 3)
    first, event_id = await past_delivery(pool, webhook_id, 40)
    finished, _ = await past_delivery(
        pool, webhook_id, 3, "delivered", event_id=event_id, redelivery_of=first
    )
    second, other_event = await past_delivery(pool, webhook_id, 35)
    pending, _ = await past_pending(pool, webhook_id, 1, event_id=other_event, redelivery_of=second)

    await run_retention(database_url)

    assert await ids(pool, "finished_deliveries") == {finished}
    assert await ids(pool, "events") == {event_id, other_event}
    assert await ids(pool, "delivery_queue") == {pending}
    assert await queue.redeliver(pool, "m_1", finished) is not None
    await assert_sound(pool)


async def test_zero_keeps_rows_without_limit(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 4000)
    delivered, _ = await past_delivery(pool, webhook_id, 4000)
    failed, _ = await past_delivery(pool, webhook_id, 4000, "failed")
    await pool.execute(
        "INSERT INTO idempotency_keys VALUES ('m_1', 'k', '', $1, now() - interval '9 years')",
        delivered,
    )
    unlimited = RetentionSettings(
        retention_delivered_days=0,
        retention_undelivered_days=0,
        retention_idempotency_days=0,
        retention_audit_days=0,
    )

    await run_retention(database_url, unlimited)
    assert await ids(pool, "finished_deliveries") == {delivered, failed}
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 1

    await run_retention(database_url, RetentionSettings(retention_undelivered_days=0))
    assert await ids(pool, "finished_deliveries") == {failed}
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 0


@pytest.mark.parametrize(("delivered", "undelivered"), [(30, 29), (0, 90)])
def test_undelivered_days_below_delivered_are_refused(delivered: int, undelivered: int) -> None:
    with pytest.raises(ValueError, match="WEBHOOK_RETENTION_UNDELIVERED_DAYS"):
        RetentionSettings(
            retention_delivered_days=delivered, retention_undelivered_days=undelivered
        )


async def test_old_keys_and_audit_entries_are_removed(pool: Any, database_url: str) -> None:
    for key, days_ago in (("young", 29), ("old", 31)):
        await pool.execute(
            "INSERT INTO idempotency_keys VALUES ('m_1', $1, '', $2, $3)",
            key,
            id_of(days_ago),
            datetime.now(UTC) - timedelta(days=days_ago),
        )
    for actor, years in (("young", 6.9), ("old", 7.1)):
        await pool.execute(
            "INSERT INTO audit_entries (id, actor, action, resource, result, request_id,"
            " created_at) VALUES ($1, $2, 'X', 'x', 'OK', '', $3)",
            id_of(years * 365.25),
            actor,
            datetime.now(UTC) - timedelta(days=years * 365.25),
        )

    report = await run_retention(database_url, operator=Operator("cli:ann", "host", "postrider/0"))

    assert (report.idempotency_keys_removed, report.audit_entries_removed) == (1, 1)
    assert await ids(pool, "idempotency_keys", "key") == {"young"}
    # The operator's run has an audit entry.
    assert await ids(pool, "audit_entries", "actor") == {"young", "cli:ann"}
    entry = await pool.fetchrow("SELECT * FROM audit_entries WHERE actor = 'cli:ann'")
    assert (entry["action"], entry["caller_address"]) == ("RunRetention", "host")
    assert entry["user_agent"] == "postrider/0"


async def test_preview_reports_the_run_and_changes_nothing(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    for days_ago in (40, 50):
        await past_delivery(pool, webhook_id, days_ago)
        await past_delivery(pool, webhook_id, days_ago, "failed")
    before = await pool.fetch("SELECT relname FROM pg_class ORDER BY 1")

    preview = await retention.preview(database_settings(database_url), SETTINGS)

    assert await pool.fetch("SELECT relname FROM pg_class ORDER BY 1") == before
    assert await pool.fetchval("SELECT count(*) FROM finished_deliveries") == 4
    assert await retention.last_completed(pool) is None
    report = await run_retention(database_url)
    assert sorted(preview.days_dropped) == sorted(report.days_dropped)
    assert preview.days_made == report.days_made
    assert (preview.deliveries_kept, preview.deliveries_removed) == (1, 1)
    assert (report.deliveries_kept, report.deliveries_removed) == (1, 1)
    assert await retention.last_completed(pool) is not None


async def test_old_runs_are_removed_except_the_furthest(pool: Any, database_url: str) -> None:
    await make_webhook_config(pool)
    # The second run had short limits and removed more than any later one.
    for days_ago, removed in ((300, 250.0), (200, 150.0), (100, 1.0)):
        await pool.execute(
            "INSERT INTO retention_runs (id, actor, began_at, removed_before)"
            " VALUES (new_uuid7(), 'engine', $1, $2)",
            datetime.now(UTC) - timedelta(days=days_ago),
            datetime.now(UTC) - timedelta(days=removed),
        )

    await run_retention(database_url)

    kept = await pool.fetch("SELECT began_at FROM retention_runs ORDER BY began_at")
    assert [(datetime.now(UTC) - row["began_at"]).days for row in kept] == [100, 0]
