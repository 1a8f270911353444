"""The size of a claim by the in-flight budget: running, unrecorded and claimed deliveries."""

import asyncio

from delivery.fairness.concurrency import InFlightBudget


def filled(budget: InFlightBudget, count: int) -> InFlightBudget:
    for _ in range(count):
        budget.attempt_started()
    return budget


async def run_ready_tasks() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_claim_size_is_one_batch_or_half_of_the_slots() -> None:
    assert await InFlightBudget(500, 62, 200).claim_size() == 200
    assert await InFlightBudget(200, 25, 200).claim_size() == 100
    assert await InFlightBudget(1, 0, 200).claim_size() == 1


async def test_claim_size_uses_the_reserve_last() -> None:
    budget = filled(InFlightBudget(100, 12, 200), 80)
    assert await budget.claim_size() == 8
    filled(budget, 8)
    assert await budget.claim_size() == 12
    filled(budget, 12)
    assert await budget.claim_size() == 0


async def test_claim_size_waits_until_claim_is_worthwhile() -> None:
    budget = filled(InFlightBudget(100, 12, 200), 100)
    waiting = asyncio.create_task(budget.claim_size())
    await run_ready_tasks()
    for _ in range(37):
        budget.attempt_ended()
    await run_ready_tasks()
    assert waiting.done()
    assert await waiting == 25


async def test_claim_under_way_reduces_the_next_claim() -> None:
    budget = InFlightBudget(100, 12, 200)
    with budget.claiming(50):
        assert await budget.claim_size() == 38
    assert await budget.claim_size() == 50


async def test_unrecorded_results_above_500_reduce_claim_size() -> None:
    budget = filled(InFlightBudget(1000, 0, 1000), 600)
    for _ in range(600):
        budget.attempt_ended()
    filled(budget, 800)
    assert await budget.claim_size() == 100
    budget.results_recorded(50)
    assert await budget.claim_size() == 150
    budget.results_recorded(550)
    assert await budget.claim_size() == 200


async def test_closed_budget_ends_the_wait() -> None:
    budget = filled(InFlightBudget(100, 12, 200), 100)
    waiting = asyncio.create_task(budget.claim_size())
    await run_ready_tasks()
    budget.close()
    await run_ready_tasks()
    assert waiting.done()
