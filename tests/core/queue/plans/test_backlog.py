"""Plans of invariants, backlogs, breakers, rate limits and stats."""

from typing import Any
from uuid import UUID

import pytest

from core.queue import backlog, breakers, rate_limit, stats
from core.queue.invariants import INVARIANTS, Invariant
from core.queue.settle import _CANCEL_WEBHOOK
from delivery import database_stats
from server.admin import queue_status
from tests.support.crowded_queue import quiet_config
from tests.support.query_plans import explain


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.name)
async def test_invariant_page_reads_only_that_page(crowded: Any, invariant: Invariant) -> None:
    plan = await explain(crowded, invariant.page(100), UUID(int=(1 << 128) - 1))
    # These also read rows created within a second of the page.
    read = max(scan.rows + scan.filtered for scan in plan.scans if scan.kind != "CTE Scan")
    near = {"event_has_deliveries", "backlog_let_in", "lease_taken_back"}
    # With statistics of an empty table, the planner sorts all blocked rows.
    bound = 5000 if invariant.name == "chain_has_first" else 200
    assert invariant.name in near or read <= bound, plan.scans


@pytest.mark.parametrize("most", [None, 8])
async def test_admission_reads_only_the_rows_of_its_configs(crowded: Any, most: int | None) -> None:
    webhook_ids = await backlog.webhooks_with_backlog(crowded)
    assert len(webhook_ids) == 10

    plan = await explain(crowded, backlog._ADMIT, webhook_ids, [16] * 10, most)

    assert plan.index_scan("delivery_queue_of_webhook").rows <= 16 * len(webhook_ids)
    chosen = plan.index_scan("delivery_queue_parked")
    assert 0 < chosen.rows <= (most or 16) * len(webhook_ids)
    assert chosen.filtered == 0
    assert plan.index_scan("webhook_configs_pkey").rows == len(webhook_ids)


async def test_backlog_listing_probes_once_per_config(crowded: Any) -> None:
    plan = await explain(crowded, backlog._WEBHOOKS_WITH_BACKLOG)

    scans = [scan for scan in plan.scans if scan.index == "delivery_queue_parked"]
    # 14,000 rows are parked. Each probe finds the next config. PostgreSQL before 18 counts one row
    # for the last probe, which finds none.
    assert 10 <= sum(scan.rows for scan in scans) <= 11
    assert plan.pages <= 60


async def test_breaker_change_reads_only_rows_of_its_config(crowded: Any) -> None:
    [webhook_id, *_] = await backlog.webhooks_with_backlog(crowded)
    ready = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1 AND state <> 'parked'",
        webhook_id,
    )

    opening = await explain(
        crowded, breakers._OPEN, [webhook_id], [None], [True], [0.0], 5.0, 300.0, [1]
    )
    closing = await explain(crowded, breakers._CLOSE, [webhook_id])

    assert opening.index_scan("webhook_configs_pkey").rows == 1
    due = opening.index_scan("delivery_queue_of_webhook")
    assert due.rows + due.filtered <= ready
    assert closing.index_scan("webhook_configs_pkey").rows <= 1


async def test_rate_limit_reads_configs_by_key(crowded: Any) -> None:
    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM webhook_configs LIMIT 20")]
    await crowded.execute("UPDATE webhook_configs SET rate_limit = 5 WHERE id = ANY ($1)", ids)

    plan = await explain(crowded, rate_limit._SPEND_RATE, ids, [3] * len(ids))

    assert plan.index_scan("webhook_configs_pkey").rows <= len(ids)


async def test_park_webhooks_reads_only_ready_rows(crowded: Any) -> None:
    [webhook_id, *_] = await backlog.webhooks_with_backlog(crowded)
    waiting = "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1 AND state = 'blocked'"
    assert await crowded.fetchval(waiting, webhook_id) == 960

    plan = await explain(crowded, backlog._PARK_WEBHOOKS, [webhook_id])

    ready = plan.index_scan("delivery_queue_of_webhook")
    # The 960 blocked rows are never due and are not read.
    assert ready.rows + ready.filtered <= 100


async def test_park_due_reads_only_due_rows_of_its_config(crowded: Any) -> None:
    webhook_id = await crowded.fetchval(
        "SELECT webhook_id FROM delivery_queue WHERE state = 'ready' AND due_at <= now() LIMIT 1"
    )
    due = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue"
        " WHERE webhook_id = $1 AND state <> 'parked' AND due_at <= now()",
        webhook_id,
    )

    plan = await explain(crowded, backlog._PARK_DUE, [webhook_id])

    read = plan.index_scan("delivery_queue_of_webhook")
    assert read.rows + read.filtered == due


async def test_cancel_webhook_reads_only_its_deliveries(crowded: Any) -> None:
    webhook_id = await quiet_config(crowded)
    own = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1", webhook_id
    )

    plan = await explain(crowded, _CANCEL_WEBHOOK, webhook_id, 1000)

    of_queue = [scan for scan in plan.scans if scan.relation == "delivery_queue"]
    assert sum(scan.rows + scan.filtered for scan in of_queue) <= 4 * own


async def test_backlog_is_counted_by_index_only(crowded: Any) -> None:
    statement = queue_status._OF_ALL
    # Other scans are disabled because the choice depends on the pages that the last vacuum marked
    # as visible. The test shows that the index has all columns.
    await crowded.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    plan = await explain(crowded, statement, 20)
    await crowded.execute("RESET enable_seqscan; RESET enable_bitmapscan")

    parked = plan.index_scan("delivery_queue_parked")
    assert (parked.kind, parked.rows) == ("Index Only Scan", 14_000)
    blocked = [scan for scan in plan.scans if "blocked" in (scan.index or "")]
    assert [(scan.kind, scan.rows) for scan in blocked] == [("Index Only Scan", 4_800)]


async def test_queue_stats_read_no_more_than_their_limit(crowded: Any) -> None:
    await crowded.execute("SET enable_seqscan = off")
    await crowded.execute(stats._IN_INDEX_ORDER.replace("LOCAL ", ""))
    plan = await explain(crowded, stats._DELIVERIES, 1000)
    oldest = await explain(crowded, stats._OLDEST_DUE)
    breakers = await explain(crowded, stats._BREAKERS, 1000)
    of_three = await explain(crowded, stats._BREAKERS, 3)
    await crowded.execute("RESET enable_seqscan; RESET enable_sort")

    read = {scan.index: scan.rows for scan in plan.scans if scan.index != "pg_class_oid_index"}
    assert read == {
        "delivery_queue_due": 1000,
        "delivery_queue_parked": 1000,
        "delivery_queue_lease": 1000,
        "delivery_queue_blocked_of_webhook": 1000,
    }
    assert {(scan.index, scan.rows) for scan in oldest.scans} == {
        ("delivery_queue_due", 1),
        ("delivery_queue_lease", 1),
    }
    # One probe for each of 10 configs with a backlog, and one that finds none.
    assert breakers.index_scan("delivery_queue_parked").rows <= 11
    assert 3 <= sum(s.rows for s in of_three.scans if s.index == "delivery_queue_parked") <= 4


async def test_webhook_configs_are_counted_by_index(crowded: Any) -> None:
    plan = await explain(crowded, database_stats._CONFIGS, 1000)

    assert plan.index_scan("webhook_configs_of_merchant").rows == 1000
    assert all(scan.rows <= 1000 for scan in plan.scans)
