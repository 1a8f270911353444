"""The admission stage: who is asked for again, and when."""

from typing import Any

from delivery.admit import Admission
from tests.factories import make_delivery, make_webhook_config


async def queue_states(pool: Any) -> dict[str, int]:
    return dict(await pool.fetch("SELECT state, count(*) FROM delivery_queue GROUP BY state"))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_busy_engine_asks_for_a_config_with_enough_that_is_ready_after_a_while(
    pool: Any,
) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(4):
        await make_delivery(pool, webhook_id)
    await make_delivery(pool, webhook_id, state="parked")
    clock = Clock()
    admission = Admission(pool, clock)
    admission.meet([webhook_id])
    await admission.refill(lambda _: 4, busy=True)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")

    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"parked": 1}
    clock.now += 0.2
    await admission.refill(lambda _: 4, busy=True)
    assert await queue_states(pool) == {"ready": 1}


async def test_an_engine_that_has_nothing_else_asks_at_once(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(4):
        await make_delivery(pool, webhook_id)
    await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.meet([webhook_id])
    await admission.refill(lambda _: 4)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")

    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_a_config_that_had_no_places_is_asked_for_as_soon_as_it_has(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.meet([webhook_id])

    await admission.refill(lambda _: 0)
    assert await queue_states(pool) == {"parked": 1}
    await admission.refill(lambda _: 4)
    assert await queue_states(pool) == {"ready": 1}


async def test_what_was_let_in_is_claimed_before_its_config_is_asked_for_again(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(3):
        await make_delivery(pool, webhook_id, state="parked")
    admission = Admission(pool, Clock())
    admission.meet([webhook_id])

    assert await admission.refill(lambda _: 1)
    await pool.execute("DELETE FROM delivery_queue WHERE state = 'ready'")
    assert not await admission.refill(lambda _: 1)
    assert await queue_states(pool) == {"parked": 2}
    assert await admission.refill(lambda _: 1)
