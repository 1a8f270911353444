"""The admission stage: which configs an engine refills, and when."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from delivery.fairness.admission import Admission
from tests.support.clock import ManualClock
from tests.support.factories import lease_one, make_delivery, make_webhook_config


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def admission(pool: Any, clock: ManualClock) -> Admission:
    return Admission(pool, clock)


async def queue_states(pool: Any) -> dict[str, int]:
    return dict(await pool.fetch("SELECT state, count(*) FROM delivery_queue GROUP BY state"))


async def take_ready(pool: Any) -> None:
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")


async def met_backlog(pool: Any, admission: Admission, parked: int, ready: int = 0) -> UUID:
    """Make a config with a backlog that the engine knows."""
    webhook_id = await make_webhook_config(pool)
    for state in ["ready"] * ready + ["parked"] * parked:
        await make_delivery(pool, webhook_id, state=state)
    admission.backlogs_met([webhook_id])
    return webhook_id


async def claim_prompt_delivery(pool: Any, admission: Admission) -> None:
    """Claim a delivery of another config, which limits how fast backlogs are admitted."""
    admission.claimed([await lease_one(pool, await make_webhook_config(pool))])


async def test_busy_engine_delays_refill_of_config_with_ready(
    pool: Any, admission: Admission, clock: ManualClock
) -> None:
    await met_backlog(pool, admission, parked=1, ready=4)
    await admission.refill(lambda _: 4, busy=True)
    await take_ready(pool)

    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"parked": 1}
    clock.now += 0.2
    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"ready": 1}


async def test_idle_engine_refills_at_once(pool: Any, admission: Admission) -> None:
    await met_backlog(pool, admission, parked=1, ready=4)
    await admission.refill(lambda _: 4)
    await take_ready(pool)

    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_refill_happens_when_slots_become_free(pool: Any, admission: Admission) -> None:
    await met_backlog(pool, admission, parked=1)

    await admission.refill(lambda _: 0)
    assert await queue_states(pool) == {"parked": 1}
    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_refill_waits_until_admitted_are_claimed(pool: Any, admission: Admission) -> None:
    await met_backlog(pool, admission, parked=3)

    assert await admission.refill(lambda _: 1)
    await take_ready(pool)
    assert not await admission.refill(lambda _: 1)
    assert await queue_states(pool) == {"parked": 2}
    assert await admission.refill(lambda _: 1)


async def test_backlog_beside_prompt_deliveries_is_admitted_in_chunks(
    pool: Any, admission: Admission, clock: ManualClock
) -> None:
    flooded = await met_backlog(pool, admission, parked=40)
    await claim_prompt_delivery(pool, admission)

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 32, "ready": 8}
    assert not admission.can_refill([flooded])
    assert not await admission.refill(lambda _: 32)
    clock.now += admission.seconds_until_next()
    assert admission.can_refill([flooded])
    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 24, "ready": 16}


async def test_many_backlogs_are_admitted_as_fast_as_one(pool: Any, admission: Admission) -> None:
    for _ in range(5):
        await met_backlog(pool, admission, parked=6)
    await claim_prompt_delivery(pool, admission)

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "ready": 30}


async def test_backlog_rate_ends_with_prompt_deliveries(
    pool: Any, admission: Admission, clock: ManualClock
) -> None:
    await met_backlog(pool, admission, parked=40)
    await claim_prompt_delivery(pool, admission)
    assert await admission.refill(lambda _: 32)
    clock.now += 0.6
    # The deliveries of the previous refill are claimed first.
    assert not await admission.refill(lambda _: 32)
    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 8, "ready": 32}


async def test_sweep_admits_a_chunk_at_any_time(pool: Any, admission: Admission) -> None:
    await met_backlog(pool, admission, parked=20)
    await claim_prompt_delivery(pool, admission)

    for count in (8, 16):
        assert await admission.sweep(lambda _: 32)
        assert await queue_states(pool) == {"leased": 1, "parked": 20 - count, "ready": count}


async def test_late_deliveries_and_retries_do_not_limit_backlog(
    pool: Any, admission: Admission
) -> None:
    await met_backlog(pool, admission, parked=40)
    delivery = await lease_one(pool, await make_webhook_config(pool))
    late = delivery.claimed_at - timedelta(seconds=2)
    admission.claimed(
        [
            delivery._replace(due_since=late),
            delivery._replace(attempt_count=1),
            delivery._replace(has_backlog=True),
        ]
    )

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 8, "ready": 32}


async def test_only_admitted_deliveries_count_towards_the_rate(
    pool: Any, admission: Admission
) -> None:
    await met_backlog(pool, admission, parked=4)
    await claim_prompt_delivery(pool, admission)

    assert await admission.refill(lambda _: 1)
    assert await queue_states(pool) == {"leased": 1, "parked": 3, "ready": 1}
    assert admission.seconds_until_next() < 2 / 50
