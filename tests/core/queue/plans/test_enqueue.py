"""Plans of the enqueue statements and of chains."""

from typing import Any
from uuid import UUID

import pytest

from core.queue import ordering
from core.queue.enqueue import (
    _ENQUEUE,
    _ENQUEUE_BURST,
    _ENQUEUE_IN_ORDER,
    _EVENT,
    _READY_MAX,
    _ranks,
)
from tests.support.factories import make_event
from tests.support.query_plans import explain


@pytest.mark.parametrize("statement", [_ENQUEUE, _ENQUEUE_BURST])
async def test_enqueue_reads_configs_and_backlogs_by_index(crowded: Any, statement: str) -> None:
    events = [make_event(merchant_id=f"m_{n}", idempotency_key=f"k{n}") for n in (10, 20, 30)]

    plan = await explain(crowded, statement, *_EVENT.arguments(events), _ranks(events))

    assert plan.index_scan("webhook_configs_of_merchant").rows <= 20
    # At most the first row of a backlog, and as many other rows as may be ready.
    matched = 2 * len(events)
    parked = plan.index_scan("delivery_queue_parked")
    assert (parked.rows <= matched, parked.filtered) == (True, 0)
    if statement is _ENQUEUE_BURST:
        due = plan.index_scan("delivery_queue_of_webhook")
        assert (due.rows <= matched * _READY_MAX, due.filtered) == (True, 0)


async def test_enqueue_without_ordering_keys_reads_no_chains(crowded: Any) -> None:
    events = [make_event(merchant_id="m_1") for _ in range(3)]

    plan = await explain(crowded, _ENQUEUE, *_EVENT.arguments(events), _ranks(events))

    chains = {"delivery_queue_first", "delivery_queue_blocked"}
    assert not chains & {scan.index for scan in plan.scans}
    assert "WindowAgg" not in plan.kinds


async def test_enqueue_in_order_reads_only_the_ends_of_chains(crowded: Any) -> None:
    merchant_id, configs = await crowded.fetchrow("""
        SELECT merchant_id, count(DISTINCT webhook_id) FROM delivery_queue
        WHERE state = 'blocked' GROUP BY merchant_id LIMIT 1
    """)
    keys = [f"key {n}" for n in range(1, 21)]
    events = [make_event(merchant_id=merchant_id, ordering_key=key) for key in keys]

    plan = await explain(crowded, _ENQUEUE_IN_ORDER, *_EVENT.arguments(events), _ranks(events))

    # Every chain has 24 blocked deliveries, and every second chain has a first one.
    last = plan.index_scan("delivery_queue_blocked")
    assert (last.rows, last.filtered) == (20 * configs, 0)
    first = plan.index_scan("delivery_queue_first")
    assert (first.rows, first.filtered) == (plan.halved(10 * configs), 0)


async def test_promote_reads_only_the_start_of_each_chain(crowded: Any) -> None:
    chains = await ordering.chains_after(crowded, None, 1000)
    assert len(chains) == 200

    plan = await explain(
        crowded,
        ordering._PROMOTE,
        [chain.webhook_id for chain in chains],
        [chain.ordering_key for chain in chains],
    )

    assert plan.index_scan("delivery_queue_first").rows == plan.halved(100)
    # One row per chain. Chains that have a first delivery may be read as well.
    assert 100 <= plan.index_scan("delivery_queue_blocked").rows <= 200
    assert plan.index_scan("delivery_queue_pkey").rows == 100


async def test_chain_listing_probes_once_per_chain(crowded: Any) -> None:
    found, after = [], None
    while page := await ordering.chains_after(crowded, after, 30):
        found += page
        after = page[-1]
    assert len(found) == len(set(found)) == 200

    plan = await explain(crowded, ordering._CHAINS, UUID(int=0), "", 50)

    scans = [scan for scan in plan.scans if scan.index == "delivery_queue_blocked"]
    assert sum(scan.rows for scan in scans) == 50
    assert sum(scan.filtered for scan in scans) == 0
