"""How much a claim asks for, by what runs, what waits to be recorded and what is asked for."""

import asyncio

from delivery.fairness.concurrency import InFlightBudget


def filled(room: InFlightBudget, count: int) -> InFlightBudget:
    for _ in range(count):
        room.attempt_began()
    return room


async def steps() -> None:
    """Let whoever can go on do so."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_an_empty_engine_asks_for_a_batch_and_never_for_more_than_half() -> None:
    assert await InFlightBudget(500, 62, 200).wait() == 200
    assert await InFlightBudget(200, 25, 200).wait() == 100
    assert await InFlightBudget(1, 0, 200).wait() == 1


async def test_what_is_free_is_asked_for_after_a_short_wait_and_the_reserve_last() -> None:
    room = filled(InFlightBudget(100, 12, 200), 80)
    assert await room.wait() == 8
    filled(room, 8)
    assert await room.wait() == 12
    filled(room, 12)
    assert await room.wait() == 0


async def test_a_claim_waits_no_longer_than_until_it_is_worth_it() -> None:
    room = filled(InFlightBudget(100, 12, 200), 100)
    waiting = asyncio.create_task(room.wait())
    await steps()
    for _ in range(37):
        room.attempt_ended()
    await steps()
    assert waiting.done()
    assert await waiting == 25


async def test_what_one_claim_asks_for_is_not_asked_for_by_another() -> None:
    room = InFlightBudget(100, 12, 200)
    with room.asking_for(50):
        assert await room.wait() == 38
    assert await room.wait() == 50


async def test_results_take_places_only_from_the_five_hundredth_on() -> None:
    room = filled(InFlightBudget(1000, 0, 1000), 600)
    for _ in range(600):
        room.attempt_ended()
    filled(room, 800)
    assert await room.wait() == 100
    room.settled(50)
    assert await room.wait() == 150
    room.settled(550)
    assert await room.wait() == 200


async def test_nobody_waits_for_an_engine_that_stops() -> None:
    room = filled(InFlightBudget(100, 12, 200), 100)
    waiting = asyncio.create_task(room.wait())
    await steps()
    room.close()
    await steps()
    assert waiting.done()
