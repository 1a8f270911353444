"""Plans of claims, leases and settles."""

from datetime import timedelta
from typing import Any

import pytest

from core.ids import new_id
from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.queue import Settlement, backlog
from core.queue.claim import _CLAIM, _RECLAIM, _RECLAIMED_OFTEN, _RELEASE, _RELEASE_CLAIMED
from core.queue.settle import _HELD, _INPUT, _SETTLE
from tests.support.factories import STARTED_AT
from tests.support.query_plans import explain


async def test_claim_reads_only_the_rows_it_takes(crowded: Any) -> None:
    plan = await explain(crowded, _CLAIM, 100, new_id(), timedelta(seconds=60))

    due = plan.index_scan("delivery_queue_due")
    assert (due.rows, due.filtered) == (100, 0)
    assert plan.index_scan("delivery_queue_pkey").rows == 100
    assert plan.index_scan("events_day_pkey").rows == 100
    assert plan.index_scan("delivery_queue_parked").rows <= 100
    assert plan.days_entered("events") == 1


async def test_claim_cost_is_independent_of_the_backlog(crowded: Any) -> None:
    arguments = (100, new_id(), timedelta(seconds=60))
    before = await explain(crowded, _CLAIM, *arguments)
    transaction = crowded.transaction()
    await transaction.start()
    # The new rows are due longest, so a claim that read parked rows would read these first.
    await crowded.execute("""
        INSERT INTO delivery_queue
            (id, webhook_id, event_id, merchant_id, event_type, state, due_at)
        SELECT new_uuid7(), webhook_id, event_id, merchant_id, event_type, 'parked',
            now() - interval '1 year'
        FROM delivery_queue, generate_series(1, 2)
    """)
    after = await explain(crowded, _CLAIM, *arguments)
    await transaction.rollback()
    await crowded.execute("VACUUM delivery_queue")

    fewer, more = before.index_scan("delivery_queue_due"), after.index_scan("delivery_queue_due")
    assert (more.rows, more.filtered) == (fewer.rows, 0)
    assert more.pages <= fewer.pages + 2


async def test_reclaim_reads_only_ended_leases(crowded: Any) -> None:
    plan = await explain(crowded, _RECLAIM, 100)

    lease = plan.index_scan("delivery_queue_lease")
    ended = await crowded.fetchval("SELECT count(*) FROM delivery_queue WHERE lease_until < now()")
    assert 100 <= lease.rows <= ended < 2000
    assert lease.filtered == 0
    assert plan.index_scan("delivery_queue_pkey").rows == 100
    # With a limit above the number of ended leases, no held lease is read.
    whole = (await explain(crowded, _RECLAIM, ended + 100)).index_scan(lease.index or "")
    assert (whole.rows, whole.filtered) == (ended, 0)

    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM delivery_queue LIMIT 100")]
    often = await explain(crowded, _RECLAIMED_OFTEN, ids, 3)
    looked_at = often.index_scan("delivery_queue_pkey")
    assert looked_at.rows + looked_at.filtered == 100


async def test_release_of_lost_claims_reads_only_leases(crowded: Any) -> None:
    lease_ids = [
        row["lease_id"]
        for row in await crowded.fetch(
            "SELECT lease_id FROM delivery_queue WHERE state = 'leased' LIMIT 10"
        )
    ]

    plan = await explain(crowded, _RELEASE_CLAIMED, lease_ids)

    leased = await crowded.fetchval("SELECT count(*) FROM delivery_queue WHERE state = 'leased'")
    scan = plan.index_scan("delivery_queue_lease")
    assert (scan.rows, scan.rows + scan.filtered) == (10, leased)


@pytest.mark.parametrize("statement", [_RELEASE, backlog._PARK_LEASED])
async def test_leases_are_returned_by_key(crowded: Any, statement: str) -> None:
    leased = await crowded.fetch(
        "SELECT id, lease_id FROM delivery_queue WHERE state = 'leased' LIMIT 50"
    )

    plan = await explain(
        crowded, statement, [row["id"] for row in leased], [row["lease_id"] for row in leased]
    )

    assert plan.index_scan("delivery_queue_pkey").rows == 50


async def test_held_reads_deliveries_by_key(crowded: Any) -> None:
    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM delivery_queue LIMIT 100")]
    plan = await explain(crowded, _HELD, ids, ids[:50])
    queue_scans = [scan for scan in plan.scans if scan.relation == "delivery_queue"]
    assert [scan.rows + scan.filtered for scan in queue_scans] == [100, 100]


async def test_settle_reads_deliveries_and_configs_by_key(crowded: Any) -> None:
    leased = await crowded.fetch(
        "SELECT id, lease_id, webhook_id FROM delivery_queue WHERE state = 'leased' LIMIT 100"
    )
    states = [DeliveryState.DELIVERED, DeliveryState.FAILED, None, None] * 25
    settlements = [
        Settlement(
            delivery_id=row["id"],
            lease_id=row["lease_id"],
            webhook_id=row["webhook_id"],
            merchant_id="m_1",
            due_since=STARTED_AT,
            number=1,
            started_at=STARTED_AT,
            result=AttemptResult(Outcome.HTTP_ERROR, 500, "500", first_byte_us=1),
            final_state=state,
            next_attempt_in_seconds=60.0,
            blamed_version=1 if state is DeliveryState.FAILED else None,
        )
        for row, state in zip(leased, states, strict=True)
    ]

    plan = await explain(crowded, _SETTLE, 10, *_INPUT.arguments(settlements))

    by_key = [scan for scan in plan.scans if scan.index == "delivery_queue_pkey"]
    # Failed deliveries, finished deliveries and rescheduled ones.
    assert sorted(scan.rows + scan.filtered for scan in by_key) == [25, 50, 50]
    assert plan.index_scan("webhook_configs_pkey").rows <= 50
