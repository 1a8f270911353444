"""Recording attempt results. A settle is atomic, and a late result changes nothing."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from core import queue
from core.ids import new_id
from core.lifecycle import Outcome
from core.queue import LeasedDelivery, Settlement, SettleResult
from tests.support.factories import (
    STARTED_AT,
    attempts,
    failed,
    health,
    ids_of,
    lease_many,
    lease_one,
    make_webhook_config,
    places,
    promptly,
    rescheduled,
    settle,
    settlement,
    states,
)


async def test_delivered_delivery_moves_to_the_history(pool: Any, webhook_id: UUID) -> None:
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


async def test_failed_delivery_without_response_moves_to_the_history(
    pool: Any, webhook_id: UUID
) -> None:
    delivery = await lease_one(pool, webhook_id, attempt_count=3)

    await settle(pool, failed(delivery, outcome=Outcome.TIMEOUT, status_code=None))

    place = (await places(pool))[delivery.id]
    assert (place.state, place.attempt_count) == ("failed", 4)
    assert await attempts(pool) == [(delivery.id, 4, "timeout")]
    assert await pool.fetchval("SELECT status_code FROM attempts") is None


async def test_rescheduled_delivery_is_due_after_its_backoff(pool: Any, webhook_id: UUID) -> None:
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


async def test_attempts_are_numbered_without_gaps(pool: Any, webhook_id: UUID) -> None:
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
async def test_second_settle_changes_nothing(pool: Any, result: Any, webhook_id: UUID) -> None:
    delivery = await lease_one(pool, webhook_id)
    await settle(pool, result(delivery))
    before = await _everything(pool)

    # As after a commit whose answer was lost.
    assert (await settle(pool, result(delivery))).delivery_ids == frozenset()

    assert await _everything(pool) == before


@pytest.mark.parametrize("result", [settlement, failed, rescheduled])
async def test_repeated_delivery_in_a_batch_is_settled_once(
    pool: Any, result: Any, webhook_id: UUID
) -> None:
    delivery = await lease_one(pool, webhook_id)

    settled = await settle(pool, result(delivery), result(delivery))

    assert settled.delivery_ids == {delivery.id}
    assert len(await attempts(pool)) == 1
    assert (await health(pool, webhook_id))[2] == (1 if result is failed else 0)


async def test_only_the_held_lease_in_a_batch_is_settled(pool: Any, webhook_id: UUID) -> None:
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


async def test_rolled_back_settle_keeps_the_lease(pool: Any, webhook_id: UUID) -> None:
    delivery = await lease_one(pool, webhook_id)
    before = await _everything(pool)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await queue.settle(connection, [failed(delivery)], 1)
        await transaction.rollback()

    assert await _everything(pool) == before
    assert (await settle(pool, settlement(delivery))).delivery_ids == {delivery.id}


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
