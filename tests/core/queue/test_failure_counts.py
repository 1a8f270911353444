"""Consecutive failures of a config, and its deactivation at the limit."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import queue
from core.lifecycle import DeactivationReason, Outcome
from core.queue import LeasedDelivery, Settlement, SettleResult
from tests.support.factories import (
    failed,
    health,
    ids_of,
    lease_many,
    lease_one,
    make_delivery,
    make_webhook_config,
    places,
    rescheduled,
    settle,
    settlement,
    states,
    until_blocked,
)


def _internal_error(delivery: LeasedDelivery) -> Settlement:
    return failed(delivery, outcome=Outcome.INTERNAL_ERROR, status_code=None)


def _refused(delivery: LeasedDelivery) -> Settlement:
    return failed(delivery, outcome=Outcome.REFUSED, status_code=None)


#: Failed, delivered, internal error, refused, rescheduled.
RESULTS = {
    "F": failed,
    "D": settlement,
    "I": _internal_error,
    "R": _refused,
    "r": rescheduled,
}


@pytest.mark.parametrize(
    ("results", "count"),
    [
        ("F", 3),
        ("FFF", 5),
        ("D", 0),
        ("FD", 0),
        ("DF", 1),
        ("FFDF", 1),
        ("DFDFF", 2),
        ("I", 2),
        ("FIF", 4),
        ("DI", 0),
        ("R", 3),
        ("r", 2),
        ("rFr", 3),
    ],
)
async def test_failures_count_in_order_and_a_success_resets(
    pool: Any, results: str, count: int
) -> None:
    for in_one_batch in (True, False):
        webhook_id = await make_webhook_config(pool, consecutive_failures=2)
        leased = await lease_many(pool, webhook_id, len(results))
        batch = [RESULTS[r](d) for r, d in zip(results, leased, strict=True)]

        for part in [batch] if in_one_batch else [[one] for one in batch]:
            await settle(pool, *part)

        assert await health(pool, webhook_id) == (True, None, count)


async def test_configs_in_one_batch_count_separately(pool: Any) -> None:
    one, two = [await make_webhook_config(pool, consecutive_failures=3) for _ in range(2)]
    [a, b] = await lease_many(pool, one, 2)
    [c, d] = await lease_many(pool, two, 2)

    await settle(pool, failed(a), failed(c), settlement(d), failed(b))

    assert (await health(pool, one))[2] == 5
    assert (await health(pool, two))[2] == 0


@pytest.mark.parametrize(("before", "active"), [(7, True), (8, False)])
async def test_config_is_deactivated_exactly_at_the_limit(
    pool: Any, before: int, active: bool
) -> None:
    webhook_id = await make_webhook_config(pool, consecutive_failures=before, version=5)
    [a, b] = await lease_many(pool, webhook_id, 2)

    settled = await settle(pool, failed(a), failed(b), limit=10)

    assert settled.deactivated == ({} if active else {webhook_id: DeactivationReason.FAILURES})
    assert await health(pool, webhook_id) == (active, None if active else "failures", before + 2)
    version, touched = await pool.fetchrow(
        "SELECT version, updated_at > created_at FROM webhook_configs"
    )
    assert (version, touched) == ((5, False) if active else (6, True))


async def test_deactivation_parks_ready_and_rescheduled_deliveries(pool: Any) -> None:
    webhook_id, other = [await make_webhook_config(pool) for _ in range(2)]
    [a, b, c] = await lease_many(pool, webhook_id, 3)
    for due_in in (0, 60):
        await make_delivery(pool, webhook_id, due_in=due_in)
    theirs = await make_delivery(pool, other)

    await settle(pool, failed(a), rescheduled(b), limit=1)

    assert await states(pool, webhook_id) == ["failed", "leased", "parked", "parked", "parked"]
    found = await places(pool)
    assert (found[b.id].state, found[c.id].state) == ("parked", "leased")
    assert found[theirs].state == "ready"


async def test_success_after_a_failure_in_the_batch_stays_active(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, consecutive_failures=9)
    [a, b] = await lease_many(pool, webhook_id, 2)

    assert (await settle(pool, failed(a), settlement(b))).deactivated == {}

    assert await health(pool, webhook_id) == (True, None, 0)


async def test_in_flight_failures_leave_a_paused_config_paused(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, active=False, consecutive_failures=9)
    [a, b] = await lease_many(pool, webhook_id, 2)

    settled = await settle(pool, failed(a), failed(b), limit=10)

    assert settled.deactivated == {}
    assert await health(pool, webhook_id) == (False, "paused", 11)
    assert await pool.fetchval("SELECT version FROM webhook_configs") == 1


async def test_deactivation_is_reported_once_and_outlasts_a_success(
    pool: Any, webhook_id: UUID
) -> None:
    [a, b, c] = await lease_many(pool, webhook_id, 3)
    reported = [
        list((await settle(pool, result, limit=1)).deactivated)
        for result in (failed(a), failed(b), settlement(c))
    ]

    assert reported == [[webhook_id], [], []]
    assert await health(pool, webhook_id) == (False, "failures", 0)


@pytest.mark.parametrize("status", [410, 500])
async def test_failures_of_an_older_config_version_do_not_count(pool: Any, status: int) -> None:
    webhook_id = await make_webhook_config(pool, consecutive_failures=9)
    old, older, new = await lease_many(pool, webhook_id, 3)
    await pool.execute("UPDATE webhook_configs SET version = 5")

    outdated = [failed(old, status_code=status, blamed_version=4)]
    outdated += [failed(older, status_code=status, blamed_version=3)]
    settled = await settle(pool, *outdated)

    both = frozenset({old.id, older.id})
    assert settled == SettleResult(both, {}, outdated=both)
    assert await health(pool, webhook_id) == (True, None, 9)
    assert await states(pool) == ["leased", "ready", "ready"]
    assert {d.id for d in await queue.claim(pool, 10, 60)} == ids_of([old, older])
    settled = await settle(pool, failed(new, status_code=status, blamed_version=5))
    assert set(settled.deactivated) == {webhook_id}


@pytest.mark.parametrize(
    ("reason", "state"), [("paused", "ready"), ("failures", "failed"), ("gone", "failed")]
)
async def test_deactivation_is_no_newer_config_version(
    pool: Any, reason: str, state: str, webhook_id: UUID
) -> None:
    delivery = await lease_one(pool, webhook_id)
    await pool.execute(
        "UPDATE webhook_configs SET version = 5, active = false, deactivation_reason = $1", reason
    )

    await settle(pool, failed(delivery, blamed_version=4))

    assert await states(pool) == [state]


async def test_only_the_current_version_in_a_batch_is_blamed(pool: Any, webhook_id: UUID) -> None:
    old, new = await lease_many(pool, webhook_id, 2)
    await pool.execute("UPDATE webhook_configs SET version = 5")

    await settle(
        pool, failed(new, blamed_version=5), failed(old, status_code=410, blamed_version=4)
    )

    assert await health(pool, webhook_id) == (True, None, 1)


async def test_settle_does_not_write_a_healthy_config(pool: Any, webhook_id: UUID) -> None:
    before = await pool.fetchval("SELECT xmin::text || ctid::text FROM webhook_configs")
    leased = await lease_many(pool, webhook_id, 3)

    await settle(pool, *map(settlement, leased[:2]), rescheduled(leased[2]))

    assert await pool.fetchval("SELECT xmin::text || ctid::text FROM webhook_configs") == before


async def test_settles_lock_shared_configs_in_one_order(pool: Any) -> None:
    # A third session locks the second config. Both settles wait there, for any order of their
    # batches, and neither holds a row that the other needs.
    configs = [await make_webhook_config(pool, consecutive_failures=1) for _ in range(3)]
    first = [await lease_one(pool, webhook_id) for webhook_id in configs]
    second = [await lease_one(pool, webhook_id) for webhook_id in configs]
    async with pool.acquire() as holder, holder.transaction():
        await holder.execute("SELECT FROM webhook_configs WHERE id = $1 FOR UPDATE", configs[1])
        settles = [
            asyncio.create_task(settle(pool, *map(failed, batch), limit=4))
            for batch in (first, second[::-1])
        ]
        await until_blocked(pool, 2)
    results = await asyncio.gather(*settles)

    assert [len(settled.delivery_ids) for settled in results] == [3, 3]
    for webhook_id in configs:
        assert await health(pool, webhook_id) == (True, None, 3)


async def test_one_of_concurrent_settles_at_the_limit_deactivates(
    pool: Any, webhook_id: UUID
) -> None:
    leased = await lease_many(pool, webhook_id, 6)

    results = await asyncio.gather(*(settle(pool, failed(d), limit=4) for d in leased))

    assert [s.deactivated for s in results].count({webhook_id: DeactivationReason.FAILURES}) == 1
    assert await health(pool, webhook_id) == (False, "failures", 6)


async def test_concurrent_batches_lose_no_failure_count(pool: Any) -> None:
    configs = [await make_webhook_config(pool) for _ in range(4)]
    leased = [(await lease_many(pool, webhook_id, 12)) for webhook_id in configs]
    batches = [[leased[c][i] for c in range(4)][:: 1 if i % 2 else -1] for i in range(12)]

    await asyncio.gather(*(settle(pool, *map(failed, batch), limit=100) for batch in batches))

    assert [(await health(pool, w))[2] for w in configs] == [12] * 4


@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_failure_count_is_independent_of_batch_boundaries(
    pool: Any, data: st.DataObject
) -> None:
    results = data.draw(st.text(alphabet="FDIRr", min_size=1, max_size=12))
    cut = data.draw(st.integers(0, len(results)))
    webhook_id = await make_webhook_config(pool)
    leased = await lease_many(pool, webhook_id, len(results))
    batch = [RESULTS[r](d) for r, d in zip(results, leased, strict=True)]

    for part in (batch[:cut], batch[cut:]):
        await settle(pool, *part, limit=100)

    since_delivered = results.rpartition("D")[2]
    count = sum(r in "FR" for r in since_delivered)
    assert await health(pool, webhook_id) == (True, None, count)
