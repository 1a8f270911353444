"""The admission stage: who is asked for again, and when."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from delivery.fairness.admission import Admission
from tests.support.factories import lease_one, make_delivery, make_webhook_config


async def queue_states(pool: Any) -> dict[str, int]:
    return dict(await pool.fetch("SELECT state, count(*) FROM delivery_queue GROUP BY state"))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_busy_engine_delays_refill_of_config_with_ready(
    pool: Any,
) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(4):
        await make_delivery(pool, webhook_id)
    await make_delivery(pool, webhook_id, state="parked")
    clock = Clock()
    admission = Admission(pool, clock)
    admission.backlogs_met([webhook_id])
    await admission.refill(lambda _: 4, busy=True)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")

    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"parked": 1}
    clock.now += 0.2
    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"ready": 1}


async def test_idle_engine_refills_at_once(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(4):
        await make_delivery(pool, webhook_id)
    await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.backlogs_met([webhook_id])
    await admission.refill(lambda _: 4)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")

    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_refill_happens_when_slots_become_free(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.backlogs_met([webhook_id])

    await admission.refill(lambda _: 0)
    assert await queue_states(pool) == {"parked": 1}
    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_refill_waits_until_admitted_are_claimed(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(3):
        await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.backlogs_met([webhook_id])

    assert await admission.refill(lambda _: 1)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")
    assert not await admission.refill(lambda _: 1)
    assert await queue_states(pool) == {"parked": 2}
    assert await admission.refill(lambda _: 1)


async def beside_another(pool: Any, parked: int, clock: Clock) -> tuple[Admission, UUID]:
    """That of an engine which met a config with so many parked, and a prompt delivery of another;
    and the former config."""
    flooded, other = await make_webhook_config(pool), await make_webhook_config(pool)
    for _ in range(parked):
        await make_delivery(pool, flooded, state="parked")
    admission = Admission(pool, clock)
    admission.backlogs_met([flooded])
    admission.claimed([await lease_one(pool, other)])
    return admission, flooded


async def test_backlog_beside_prompt_deliveries_is_admitted_in_chunks(pool: Any) -> None:
    clock = Clock()
    admission, flooded = await beside_another(pool, 40, clock)

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 32, "ready": 8}
    assert not admission.can_refill([flooded])
    assert not await admission.refill(lambda _: 32)
    clock.now += admission.seconds_until_next()
    assert admission.can_refill([flooded])
    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 24, "ready": 16}


async def test_many_backlogs_are_admitted_as_fast_as_one(pool: Any) -> None:
    other = await make_webhook_config(pool)
    busy = [await make_webhook_config(pool) for _ in range(5)]
    for webhook_id in busy:
        for _ in range(6):
            await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.backlogs_met(busy)
    admission.claimed([await lease_one(pool, other)])

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "ready": 30}


async def test_backlog_rate_ends_with_prompt_deliveries(pool: Any) -> None:
    clock = Clock()
    admission, _ = await beside_another(pool, 40, clock)
    assert await admission.refill(lambda _: 32)
    clock.now += 0.6
    # What was let in is taken first.
    assert not await admission.refill(lambda _: 32)
    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 8, "ready": 32}


async def test_sweep_admits_a_chunk_at_any_time(pool: Any) -> None:
    admission, _ = await beside_another(pool, 20, Clock())

    for count in (8, 16):
        assert await admission.sweep(lambda _: 32)
        assert await queue_states(pool) == {"leased": 1, "parked": 20 - count, "ready": count}


async def test_late_deliveries_and_retries_do_not_limit_backlog(pool: Any) -> None:
    flooded, other = await make_webhook_config(pool), await make_webhook_config(pool)
    for _ in range(40):
        await make_delivery(pool, flooded, state="parked")
    delivery = await lease_one(pool, other)
    late = delivery.claimed_at - timedelta(seconds=2)
    admission = Admission(pool, Clock())
    admission.backlogs_met([flooded])
    admission.claimed(
        [
            delivery._replace(due_since=late),
            delivery._replace(attempt_count=1),
            delivery._replace(has_backlog=True),
        ]
    )

    assert await admission.refill(lambda _: 32)
    assert await queue_states(pool) == {"leased": 1, "parked": 8, "ready": 32}


async def test_only_admitted_deliveries_count_towards_the_rate(pool: Any) -> None:
    admission, _ = await beside_another(pool, 4, Clock())

    assert await admission.refill(lambda _: 1)
    assert await queue_states(pool) == {"leased": 1, "parked": 3, "ready": 1}
    assert admission.seconds_until_next() < 2 / 50
