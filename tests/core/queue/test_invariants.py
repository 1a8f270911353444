"""The invariants: each violation is reported under its own name only."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from core import queue
from core.ids import first_id_at, new_id
from core.lifecycle import DeliveryState, Outcome
from core.queue import invariants
from core.queue.invariants import INVARIANTS
from tests.support.factories import (
    MERCHANT,
    enqueue_events,
    failed,
    lease_one,
    make_delivery,
    make_event,
    make_webhook_config,
    rescheduled,
    settle,
    settlement,
)

type Break = Callable[[Any, UUID], Awaitable[UUID]]


@pytest.fixture(autouse=True)
def _recheck_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "_SECOND_LOOK_SECONDS", 0.01)


async def broken(pool: Any) -> dict[str, Sequence[UUID]]:
    """The violations by invariant. Fails if the check was incomplete."""
    findings = await queue.check_invariants(pool, 10)
    assert all(finding.complete for finding in findings)
    return {f.invariant.name: f.broken for f in findings if f.broken}


async def finish(pool: Any, webhook_id: UUID, **overrides: Any) -> UUID:
    """A delivery that ended with its first attempt."""
    delivery = await lease_one(pool, webhook_id)
    await settle(pool, settlement(delivery, **overrides))
    return delivery.id


async def lose_an_open_delivery(pool: Any, webhook_id: UUID) -> UUID:
    [event] = await enqueue_events(pool)
    await pool.execute("DELETE FROM delivery_queue WHERE event_id = $1", event.id)
    return event.id


async def keep_a_finished_one_open(pool: Any, webhook_id: UUID) -> UUID:
    done = await lease_one(pool, webhook_id)
    await settle(pool, settlement(done))
    await pool.execute(
        "INSERT INTO delivery_queue (id, state, webhook_id, event_id, merchant_id, event_type,"
        " attempt_count, redelivery_of) SELECT id, 'ready', webhook_id, event_id, merchant_id,"
        " event_type, attempt_count, id FROM finished_deliveries WHERE id = $1",
        done.id,
    )
    return done.id


async def lose_an_event(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await make_delivery(pool, webhook_id)
    await pool.execute(
        "DELETE FROM events WHERE id = (SELECT event_id FROM delivery_queue WHERE id = $1)",
        delivery_id,
    )
    return delivery_id


async def lose_the_event_of_a_finished_one(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await finish(pool, webhook_id)
    await pool.execute("DELETE FROM events")
    return delivery_id


async def lose_the_config_of_an_open_one(pool: Any, webhook_id: UUID) -> UUID:
    return await make_delivery(pool, new_id())


async def lose_the_config_of_a_finished_one(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await finish(pool, webhook_id)
    await pool.execute("UPDATE finished_deliveries SET webhook_id = $1", new_id())
    return delivery_id


async def forget_an_attempt_of_an_open_one(pool: Any, webhook_id: UUID) -> UUID:
    for _ in range(3):
        delivery = await lease_one(pool, webhook_id) if _ == 0 else await claim_again(pool)
        await settle(pool, rescheduled(delivery, seconds=0))
    await pool.execute("DELETE FROM attempts WHERE number = 2")
    return delivery.id


async def claim_again(pool: Any) -> queue.LeasedDelivery:
    [delivery] = await queue.claim(pool, 1, 60)
    return delivery


async def forget_the_attempt_of_a_finished_one(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await finish(pool, webhook_id, **FAILED)
    await pool.execute("DELETE FROM attempts")
    return delivery_id


async def end_a_delivered_one_with_a_failure(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await finish(pool, webhook_id)
    await pool.execute("UPDATE attempts SET outcome = 'timeout'")
    return delivery_id


async def end_a_failed_one_with_a_success(pool: Any, webhook_id: UUID) -> UUID:
    delivery_id = await finish(pool, webhook_id, **FAILED)
    await pool.execute("UPDATE attempts SET outcome = 'succeeded'")
    return delivery_id


async def keep_an_ended_lease(pool: Any, webhook_id: UUID) -> UUID:
    return await make_delivery(pool, webhook_id, state="leased", lease_in=-11)


async def hold_it_for_years(pool: Any, webhook_id: UUID) -> UUID:
    return await make_delivery(pool, webhook_id, state="leased", lease_in=MONTH)


async def make_it_due_in_years(pool: Any, webhook_id: UUID) -> UUID:
    return await make_delivery(pool, webhook_id, due_in=MONTH)


async def leave_it_due(pool: Any, webhook_id: UUID) -> UUID:
    return await make_delivery(pool, webhook_id, due_in=-61)


async def leave_it_due_for_a_deleted_config(pool: Any, webhook_id: UUID) -> UUID:
    await pool.execute("UPDATE webhook_configs SET deleted_at = now()")
    return await make_delivery(pool, webhook_id, due_in=-61)


async def deactivate(pool: Any, webhook_id: UUID) -> None:
    await pool.execute(
        "UPDATE webhook_configs SET active = false, deactivation_reason = 'admin' WHERE id = $1",
        webhook_id,
    )


async def have_it_ready_while_inactive(pool: Any, webhook_id: UUID) -> UUID:
    await deactivate(pool, webhook_id)
    return await make_delivery(pool, webhook_id, due_in=-11)


async def strand_a_backlog(pool: Any, webhook_id: UUID) -> UUID:
    # A future retry takes no slot.
    await make_delivery(pool, webhook_id, due_in=60)
    await make_delivery(pool, webhook_id, state="parked")
    return webhook_id


async def strand_a_limited_backlog(pool: Any, webhook_id: UUID) -> UUID:
    await pool.execute(
        "UPDATE webhook_configs SET rate_limit = 0.5, rate_used_until = now() - interval '2.5 s'"
    )
    await make_delivery(pool, webhook_id, state="parked")
    return webhook_id


async def strand_the_backlog_of_a_half_open_breaker(pool: Any, webhook_id: UUID) -> UUID:
    await pool.execute("UPDATE webhook_configs SET breaker_open_until = now(), breaker_trips = 1")
    await make_delivery(pool, webhook_id, state="parked")
    return webhook_id


async def strand_a_chain(pool: Any, webhook_id: UUID) -> UUID:
    await pool.execute("UPDATE webhook_configs SET ordered = true")
    first, second, third = (make_event(ordering_key="k") for _ in range(3))
    await queue.enqueue_in_order(pool, [first, second, third])
    await pool.execute("DELETE FROM delivery_queue WHERE state <> 'blocked'")
    await pool.execute("UPDATE events SET delivery_count = 0 WHERE id = $1", first.id)
    delivery_id: UUID = await pool.fetchval(
        "SELECT id FROM delivery_queue WHERE event_id = $1", second.id
    )
    return delivery_id


async def lose_a_delivery_that_was_attempted(pool: Any, webhook_id: UUID) -> UUID:
    delivery = await lease_one(pool, webhook_id)
    await settle(pool, rescheduled(delivery))
    await pool.execute("DELETE FROM delivery_queue")
    await pool.execute("UPDATE events SET delivery_count = 0")
    return delivery.id


#: Seconds; slightly more than the longest delay that an event may request.
MONTH = 31 * 86_400 + 60
FAILED = {"final_state": DeliveryState.FAILED, "outcome": Outcome.HTTP_ERROR, "status_code": 500}

BREAKS: tuple[tuple[str, Break], ...] = (
    ("event_has_deliveries", lose_an_open_delivery),
    ("open_or_finished", keep_a_finished_one_open),
    ("open_event_stored", lose_an_event),
    ("open_config_known", lose_the_config_of_an_open_one),
    ("open_attempts_dense", forget_an_attempt_of_an_open_one),
    ("lease_taken_back", keep_an_ended_lease),
    ("waits_end", hold_it_for_years),
    ("waits_end", make_it_due_in_years),
    ("due_claimed", leave_it_due),
    ("due_claimed", leave_it_due_for_a_deleted_config),
    ("inactive_parked", have_it_ready_while_inactive),
    ("backlog_let_in", strand_a_backlog),
    ("backlog_let_in", strand_a_limited_backlog),
    ("backlog_let_in", strand_the_backlog_of_a_half_open_breaker),
    ("chain_has_first", strand_a_chain),
    ("finished_config_known", lose_the_config_of_a_finished_one),
    ("finished_event_stored", lose_the_event_of_a_finished_one),
    ("finished_attempts_dense", forget_the_attempt_of_a_finished_one),
    ("finished_as_attempted", end_a_delivered_one_with_a_failure),
    ("finished_as_attempted", end_a_failed_one_with_a_success),
    ("attempt_has_delivery", lose_a_delivery_that_was_attempted),
)


def test_every_invariant_has_a_violation_case() -> None:
    assert {name for name, _ in BREAKS} == {invariant.name for invariant in INVARIANTS}


@pytest.mark.parametrize(
    ("name", "break_it"), BREAKS, ids=lambda value: getattr(value, "__name__", "")
)
async def test_violation_is_reported_under_its_invariant_only(
    pool: Any, name: str, break_it: Break, webhook_id: UUID
) -> None:
    culprit = await break_it(pool, webhook_id)
    # The factories insert deliveries without counting them in their event.
    await pool.execute(
        "UPDATE events e SET delivery_count = (SELECT count(*) FROM ("
        " SELECT event_id FROM delivery_queue WHERE redelivery_of IS NULL UNION ALL"
        " SELECT event_id FROM finished_deliveries WHERE redelivery_of IS NULL"
        ") d WHERE d.event_id = e.id) WHERE merchant_id <> $1",
        MERCHANT,
    )
    assert await broken(pool) == {name: [culprit]}


@pytest.mark.parametrize("silent", [15, 16])
async def test_backlog_may_wait_while_attempts_hold_all_slots(
    pool: Any, silent: int, webhook_id: UUID
) -> None:
    await strand_a_backlog(pool, webhook_id)
    others = await make_webhook_config(pool)
    long_ago = first_id_at(datetime.now(UTC) - timedelta(seconds=5))
    for _ in range(silent):
        await make_delivery(pool, others, state="leased", lease_id=long_ago)
    # New leases and ended leases do not count as silent.
    for lease_in in (60, -1):
        await make_delivery(pool, others, state="leased", lease_in=lease_in)
    found = await broken(pool)
    assert ("backlog_let_in" in found) is (silent < 16)


async def make_history(pool: Any) -> None:
    """Create deliveries in every state with the functions of the queue."""
    busy = await make_webhook_config(pool)
    paused = await make_webhook_config(pool)
    await deactivate(pool, paused)
    await enqueue_events(pool, 4)
    delivered, given_up, retried, under_way = await queue.claim(pool, 10, 60)
    await settle(pool, settlement(delivered), failed(given_up), rescheduled(retried))
    await queue.redeliver(pool, MERCHANT, given_up.id)
    assert under_way.webhook_id == busy
    gone = await make_webhook_config(pool)
    [delivery] = await queue.claim(pool, 1, 60)
    await settle(pool, rescheduled(delivery, seconds=0))
    await enqueue_events(pool, 1)
    await pool.execute("UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", gone)
    assert await queue.cancel_webhook(pool, gone) == 1
    # The rate limit keeps these parked.
    limited = await make_webhook_config(pool, merchant_id="m_2", rate_limit=0.001)
    await pool.execute("UPDATE webhook_configs SET rate_used_until = now() WHERE id = $1", limited)
    await enqueue_events(pool, 3, merchant_id="m_2")
    await queue.park_webhooks(pool, [limited])
    held = await make_webhook_config(pool, merchant_id="m_3")
    await pool.execute(
        "UPDATE webhook_configs SET breaker_open_until = now() + interval '1 hour' WHERE id = $1",
        held,
    )
    await enqueue_events(pool, 2, merchant_id="m_3")
    await make_webhook_config(pool, merchant_id="m_4", ordered=True)
    longest = datetime.now(UTC) + timedelta(days=30)
    events = [make_event(merchant_id="m_4", ordering_key="k", not_before=longest) for _ in range(3)]
    await queue.enqueue_in_order(pool, events)


async def test_valid_state_is_no_violation(pool: Any) -> None:
    await make_history(pool)
    states = {row["state"] for row in await pool.fetch("SELECT state FROM finished_deliveries")}
    assert states == {"delivered", "failed", "cancelled"}
    states = {row["state"] for row in await pool.fetch("SELECT state FROM delivery_queue")}
    assert states == {"ready", "parked", "leased", "blocked"}
    assert await broken(pool) == {}


class RepairingPool:
    """A pool that repairs the row before the check reads it a second time."""

    def __init__(self, pool: Any, statement: str) -> None:
        self._pool = pool
        self._statement = statement

    async def fetchrow(self, statement: str, *arguments: Any) -> Any:
        if isinstance(arguments[0], list):
            await self._pool.execute(self._statement)
        return await self._pool.fetchrow(statement, *arguments)


@pytest.mark.parametrize(
    ("break_it", "repair"),
    [
        (keep_an_ended_lease, "UPDATE delivery_queue SET lease_until = now()"),
        (leave_it_due, "UPDATE delivery_queue SET due_at = now()"),
        # Admitted, claimed and parked again since the first reading.
        (strand_a_backlog, "UPDATE delivery_queue SET state = 'parked' WHERE state = 'parked'"),
    ],
)
async def test_row_changed_before_the_recheck_is_no_violation(
    pool: Any, break_it: Break, repair: str
) -> None:
    await break_it(pool, await make_webhook_config(pool))
    await pool.execute("UPDATE events SET delivery_count = 1")
    findings = await queue.check_invariants(RepairingPool(pool, repair), 10)  # type: ignore[arg-type]
    names = {f.invariant.name for f in findings if f.broken}
    assert names <= {"event_has_deliveries"}


async def test_event_with_late_deliveries_passes_the_recheck(pool: Any) -> None:
    await make_webhook_config(pool)
    [event] = await enqueue_events(pool)
    # After the clock was set back, the ids of the deliveries have another time than the event.
    await pool.execute("UPDATE events SET created_at = now() - interval '1 day'")
    assert await broken(pool) == {}
    await pool.execute("UPDATE events SET delivery_count = 2")
    assert await broken(pool) == {"event_has_deliveries": [event.id]}


async def test_check_walks_all_pages_with_time_and_one_without(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_webhook_config(pool)
    events = await enqueue_events(pool, 5)
    await pool.execute("DELETE FROM delivery_queue WHERE event_id = $1", events[0].id)
    monkeypatch.setattr(invariants, "_PAGE", 2)

    whole = (await queue.check_invariants(pool, 10))[0]
    assert (whole.examined, whole.broken, whole.complete) == (5, [events[0].id], True)
    hurried = (await queue.check_invariants(pool, 0))[0]
    # The newest rows are read first.
    assert (hurried.examined, hurried.broken, hurried.complete) == (2, [], False)


async def test_no_violation_is_reported_under_load(pool: Any, webhook_id: UUID) -> None:
    stop = asyncio.Event()

    async def work() -> int:
        done = 0
        while not stop.is_set():
            await enqueue_events(pool, 3)
            leased = await queue.claim(pool, 5, 60)
            for delivery, result in zip(leased, (settlement, failed, rescheduled), strict=False):
                await settle(pool, result(delivery), limit=10**6)
            await queue.park_leased(pool, leased[3:])
            await queue.admit(pool, {webhook_id: 32})
            done += 1
        return done

    workers = [asyncio.create_task(work()) for _ in range(3)]
    for _ in range(10):
        findings = await queue.check_invariants(pool, 10)
        assert {f.invariant.name: f.broken for f in findings if f.broken} == {}
    stop.set()
    assert min(await asyncio.gather(*workers)) > 0
