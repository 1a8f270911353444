"""Settling: results of attempts into the database, all or nothing of each, and what they count."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import queue
from core.ids import new_id
from core.lifecycle import DeactivationReason, Outcome
from core.queue import LeasedDelivery, Settlement, SettleResult
from tests.support.factories import (
    STARTED_AT,
    attempts,
    failed,
    health,
    ids_of,
    lease_many,
    lease_one,
    make_delivery,
    make_webhook_config,
    places,
    promptly,
    rescheduled,
    settle,
    settlement,
    states,
    until_blocked,
)


async def test_delivered_delivery_moves_to_the_history(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id, redelivery_of=new_id())
    queued = await pool.fetchrow("SELECT * FROM delivery_queue")
    details = {
        "dns_us": 1,
        "connect_us": 3,
        "tls_us": 2,
        "first_byte_us": 4,
        "remote_address": "192.0.2.1",
        "response_excerpt": "thanks",
    }

    settled = await settle(pool, settlement(delivery, **details))

    assert settled == SettleResult(frozenset({delivery.id}), {})
    assert await pool.fetchval("SELECT count(*) FROM delivery_queue") == 0
    finished = await pool.fetchrow("SELECT * FROM finished_deliveries")
    assert (finished["state"], finished["attempt_count"]) == ("delivered", 1)
    for column in set(queued.keys()) & set(finished.keys()) - {"state", "attempt_count"}:
        assert finished[column] == queued[column]
    attempt = dict(await pool.fetchrow("SELECT * FROM attempts"))
    attempt.pop("recorded_xid", None)
    assert attempt == {
        "delivery_id": delivery.id,
        "number": 1,
        "outcome": "succeeded",
        "status_code": 200,
        "detail": "200 OK",
        "started_at": STARTED_AT,
        "duration_us": 1500,
        "kept": False,
        **details,
    }


async def test_failed_delivery_without_response_moves_to_the_history(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id, attempt_count=3)

    await settle(pool, failed(delivery, outcome=Outcome.TIMEOUT, status_code=None))

    place = (await places(pool))[delivery.id]
    assert (place.state, place.attempt_count) == ("failed", 4)
    assert await attempts(pool) == [(delivery.id, 4, "timeout")]
    assert await pool.fetchval("SELECT status_code FROM attempts") is None


async def test_rescheduled_delivery_is_due_after_its_backoff(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id, reclaim_count=2)

    settled = await settle(pool, rescheduled(delivery, seconds=90.5))

    assert settled.delivery_ids == {delivery.id}
    place = (await places(pool))[delivery.id]
    assert (place.state, place.lease_id) == ("ready", None)
    assert (place.attempt_count, place.reclaim_count) == (1, 2)
    assert place.due_in == pytest.approx(90.5, abs=10)
    assert await attempts(pool) == [(delivery.id, 1, "http_error")]
    assert await queue.claim(pool, 10, 60) == []
    assert await health(pool, webhook_id) == (True, None, 0)


async def test_attempts_are_numbered_without_gaps(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)
    await settle(pool, rescheduled(delivery, seconds=0))
    [delivery] = await queue.claim(pool, 1, 60)
    await queue.release(pool, [delivery])
    [delivery] = await queue.claim(pool, 1, 60)
    await _lose(pool, delivery)
    [delivery] = await queue.claim(pool, 1, 60)
    await queue.park_leased(pool, [delivery])
    await queue.admit(pool, {webhook_id: 4})
    [delivery] = await queue.claim(pool, 1, 60)
    assert delivery.attempt_count == 1
    await settle(pool, rescheduled(delivery, seconds=0))
    [delivery] = await queue.claim(pool, 1, 60)
    await settle(pool, settlement(delivery))

    assert await attempts(pool) == [
        (delivery.id, 1, "http_error"),
        (delivery.id, 2, "http_error"),
        (delivery.id, 3, "succeeded"),
    ]
    assert (await places(pool))[delivery.id].attempt_count == 3


@pytest.mark.parametrize("result", [settlement, failed, rescheduled])
@pytest.mark.parametrize("since", ["reclaimed", "claimed again", "finished", "cancelled"])
async def test_late_settle_changes_nothing(pool: Any, result: Any, since: str) -> None:
    webhook_id = await make_webhook_config(pool, consecutive_failures=9)
    delivery = await lease_one(pool, webhook_id)
    await _lose(pool, delivery)
    if since == "cancelled":
        await queue.cancel_webhook(pool, webhook_id)
    elif since != "reclaimed":
        [again] = await queue.claim(pool, 1, 60)
        if since == "finished":
            await settle(pool, failed(again, outcome=Outcome.INTERNAL_ERROR))
    before = await _everything(pool)

    settled = await settle(pool, result(delivery))

    assert settled == SettleResult(frozenset(), {})
    assert await _everything(pool) == before


@pytest.mark.parametrize("result", [settlement, failed, rescheduled])
async def test_second_settle_changes_nothing(pool: Any, result: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)
    await settle(pool, result(delivery))
    before = await _everything(pool)

    # As after a commit whose answer was lost.
    assert (await settle(pool, result(delivery))).delivery_ids == frozenset()

    assert await _everything(pool) == before


@pytest.mark.parametrize("result", [settlement, failed, rescheduled])
async def test_repeated_delivery_in_a_batch_is_settled_once(pool: Any, result: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)

    settled = await settle(pool, result(delivery), result(delivery))

    assert settled.delivery_ids == {delivery.id}
    assert len(await attempts(pool)) == 1
    assert (await health(pool, webhook_id))[2] == (1 if result is failed else 0)


async def test_only_the_held_lease_in_a_batch_is_settled(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    lost = await lease_one(pool, webhook_id)
    await _lose(pool, lost)
    [held] = await queue.claim(pool, 1, 60)

    settled = await settle(pool, failed(lost), settlement(held))

    assert settled.delivery_ids == {held.id}
    assert await attempts(pool) == [(held.id, 1, "succeeded")]
    assert await states(pool) == ["delivered"]
    assert await health(pool, webhook_id) == (True, None, 0)


async def test_batch_may_mix_all_kinds_of_results(pool: Any) -> None:
    good, bad = [await make_webhook_config(pool) for _ in range(2)]
    [a, b, c] = await lease_many(pool, good, 3)
    [d, e] = await lease_many(pool, bad, 2)
    lost = await lease_one(pool, bad)
    await _lose(pool, lost)

    settled = await settle(
        pool, settlement(a), rescheduled(b), settlement(c), failed(d), rescheduled(e), failed(lost)
    )

    assert settled.delivery_ids == ids_of([a, b, c, d, e])
    assert await states(pool, good) == ["delivered", "delivered", "ready"]
    assert await states(pool, bad) == ["failed", "ready", "ready"]
    assert [number for _, number, _ in await attempts(pool)] == [1] * 5
    assert await health(pool, good) == (True, None, 0)
    assert await health(pool, bad) == (True, None, 1)


async def test_empty_batch_settles_nothing(pool: Any) -> None:
    assert (await settle(pool)).delivery_ids == frozenset()


async def test_rolled_back_settle_keeps_the_lease(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)
    before = await _everything(pool)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await queue.settle(connection, [failed(delivery)], 1)
        await transaction.rollback()

    assert await _everything(pool) == before
    assert (await settle(pool, settlement(delivery))).delivery_ids == {delivery.id}


# --- consecutive failures


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


async def test_deactivation_is_reported_once_and_outlasts_a_success(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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
    # The present version has the last word.
    assert await states(pool) == ["leased", "ready", "ready"]
    assert {d.id for d in await queue.claim(pool, 10, 60)} == ids_of([old, older])
    settled = await settle(pool, failed(new, status_code=status, blamed_version=5))
    assert set(settled.deactivated) == {webhook_id}


@pytest.mark.parametrize(
    ("reason", "state"), [("paused", "ready"), ("failures", "failed"), ("gone", "failed")]
)
async def test_deactivation_is_no_newer_config_version(pool: Any, reason: str, state: str) -> None:
    webhook_id = await make_webhook_config(pool)
    delivery = await lease_one(pool, webhook_id)
    await pool.execute(
        "UPDATE webhook_configs SET version = 5, active = false, deactivation_reason = $1", reason
    )

    await settle(pool, failed(delivery, blamed_version=4))

    assert await states(pool) == [state]


async def test_only_the_current_version_in_a_batch_is_blamed(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    old, new = await lease_many(pool, webhook_id, 2)
    await pool.execute("UPDATE webhook_configs SET version = 5")

    await settle(
        pool, failed(new, blamed_version=5), failed(old, status_code=410, blamed_version=4)
    )

    assert await health(pool, webhook_id) == (True, None, 1)


async def test_settle_does_not_write_a_healthy_config(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    before = await pool.fetchval("SELECT xmin::text || ctid::text FROM webhook_configs")
    leased = await lease_many(pool, webhook_id, 3)

    await settle(pool, *map(settlement, leased[:2]), rescheduled(leased[2]))

    assert await pool.fetchval("SELECT xmin::text || ctid::text FROM webhook_configs") == before


async def test_settles_lock_shared_configs_in_one_order(pool: Any) -> None:
    # A third session holds the second config: both settles stop there, in whatever order their
    # batches name the configs, and neither holds what the other needs.
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


async def test_one_of_concurrent_settles_at_the_limit_deactivates(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
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


# --- however results are cut into batches


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


async def _lose(pool: Any, delivery: LeasedDelivery) -> None:
    """End a lease and reclaim the delivery, due at once."""
    await pool.execute(
        "UPDATE delivery_queue SET lease_until = now() - interval '1 second' WHERE id = $1",
        delivery.id,
    )
    assert await queue.reclaim(pool, 10) == [delivery.id]


async def _everything(pool: Any) -> list[Any]:
    """All rows a settle could write, with their physical versions: not even an idle write."""
    tables = ("delivery_queue", "finished_deliveries", "attempts", "webhook_configs")
    return [
        [tuple(row) for row in await pool.fetch(f"SELECT t.xmin::text, t.* FROM {table} t")]  # noqa: S608
        for table in tables
    ]


async def test_held_reports_only_deliveries_with_locked_rows(pool: Any) -> None:
    mine, theirs = await lease_many(pool, await make_webhook_config(pool), 2)
    gone = mine._replace(id=new_id())
    settlements = [settlement(delivery) for delivery in (mine, theirs, gone)]
    async with pool.acquire() as idle, idle.transaction():
        await idle.execute("SELECT FROM delivery_queue WHERE id = $1 FOR UPDATE", theirs.id)
        async with pool.acquire() as connection, connection.transaction():
            assert await promptly(queue.held(connection, settlements)) == {theirs.id}
            free = [settlements[0], settlements[2]]
            settled = await promptly(queue.settle(connection, free, 10))
            assert settled.delivery_ids == {mine.id}
    assert await queue.held(pool, settlements) == set()


@pytest.mark.parametrize(
    ("failures", "result", "is_held"),
    [(0, settlement, False), (1, settlement, True), (0, rescheduled, False), (0, failed, True)],
)
async def test_locked_config_holds_only_results_that_write_it(
    pool: Any, failures: int, result: Callable[..., Settlement], is_held: bool
) -> None:
    webhook_id = await make_webhook_config(pool, consecutive_failures=failures)
    delivery = await lease_one(pool, webhook_id)
    async with pool.acquire() as idle, idle.transaction():
        await idle.execute("SELECT FROM webhook_configs FOR UPDATE")
        held = await promptly(queue.held(pool, [result(delivery)]))
        assert held == ({delivery.id} if is_held else set())
        if not is_held:
            await promptly(settle(pool, result(delivery)))
