"""Open requests per engine and per config, and receivers that never answer."""

import asyncio
import itertools
from time import monotonic
from typing import Any

import pytest

from delivery import engine
from delivery.claim import claim
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import queue_states, until_queued
from tests.support.receiver import Receiver


@pytest.mark.parametrize(
    ("configured", "operator", "expected"), [(2, 32, 2), (1000, 3, 3), (0, 4, 4)]
)
async def test_smaller_in_flight_limit_applies(
    platform: Platform,
    receiver: Receiver,
    pool: Any,
    *,
    configured: int,
    operator: int,
    expected: int,
) -> None:
    await platform.register(receiver.url, max_in_flight=configured)
    receiver.default = response = HeldResponse()
    async with platform.engine(max_in_flight_per_webhook=operator):
        await platform.publish_many(12)
        await until_queued(pool, {"leased": expected, "parked": 12 - expected})
        response.release()
        await receiver.wait_for(12)
    assert response.most_held == expected
    assert len(receiver.webhooks) == 12


async def test_open_requests_stay_below_max_in_flight(
    platform: Platform, receiver: Receiver
) -> None:
    response = HeldResponse()
    merchants = [f"m_{number}" for number in range(6)]
    for merchant_id in merchants:
        await platform.register(receiver.url, merchant_id)
    async with platform.engine(max_in_flight=5, max_in_flight_per_webhook=2):
        # One success each, because configs without history share half of the slots.
        for merchant_id in merchants:
            await platform.publish(merchant_id=merchant_id)
        await receiver.wait_for(6)
        receiver.default = response
        for merchant_id in merchants:
            await platform.publish_many(4, merchant_id)
        await response.wait_for(5)
        response.release()
        await receiver.wait_for(30)
    assert response.most_held == 5
    assert len(set(receiver.message_ids)) == 30


async def test_parallel_claims_stay_below_max_in_flight(
    platform: Platform, receiver: Receiver
) -> None:
    merchants = [f"m_{number}" for number in range(12)]
    for merchant_id in merchants:
        # A rate limit adds a statement between a claim and its attempts.
        await platform.register(receiver.url, merchant_id, rate_limit=1000)
    async with platform.engine(max_in_flight=8):
        for merchant_id in merchants:
            await platform.publish(merchant_id=merchant_id)
        await receiver.wait_for(12)
        # Claims overlap by chance, so one round is not enough.
        for rounds in range(1, 9):
            receiver.default = response = HeldResponse()
            for merchant_id in merchants:
                await platform.publish_many(4, merchant_id)
            await response.wait_for(8)
            response.release()
            await receiver.wait_for(12 + rounds * 48)
            assert response.most_held == 8


async def test_full_claims_run_two_at_a_time(
    platform: Platform, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = running = most_running = 0
    third = asyncio.Event()

    async def counted(*arguments: Any) -> Any:
        nonlocal started, running, most_running
        started, running = started + 1, running + 1
        most_running = max(most_running, running)
        try:
            if started == 2:
                async with asyncio.timeout(20):
                    await third.wait()
            if started == 3:
                third.set()
            return await claim(*arguments)
        finally:
            running -= 1

    monkeypatch.setattr(engine, "claim", counted)
    for number in range(20):
        await platform.register(receiver.url, f"m_{number}")
        await platform.publish(merchant_id=f"m_{number}")
    async with platform.engine(claim_batch=1, max_in_flight=40):
        await receiver.wait_for(20)
    assert most_running == 2
    assert len(set(receiver.message_ids)) == len(receiver.message_ids) == 20


async def test_silent_receiver_uses_only_its_own_slots(
    platform: Platform, receiver: Receiver, start_receiver: Any, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = response = HeldResponse()
    async with start_receiver() as healthy, platform.engine(max_in_flight_per_webhook=4):
        await platform.register(healthy.url, "m_2")
        flooded = await platform.publish_many(200)
        await response.wait_for(4)
        healthy_events = await platform.publish_many(50, "m_2")
        await healthy.wait_for(50)
        assert sorted(healthy.message_ids) == sorted(healthy_events)
        assert len(receiver.webhooks) == 4
        response.release()
        await receiver.wait_for(200)
    assert response.most_held == 4
    assert sorted(receiver.message_ids) == sorted(flooded)
    assert not await queue_states(pool)


async def test_silent_receivers_hold_at_most_half_of_the_slots(
    platform: Platform, receiver: Receiver, start_receiver: Any, pool: Any
) -> None:
    healthy = [f"healthy_{n}" for n in range(4)]
    silent = [f"silent_{n}" for n in range(40)]
    receiver.default = response = HeldResponse()
    async with start_receiver() as healthy_receiver:
        for merchant_id in healthy:
            await platform.register(healthy_receiver.url, merchant_id)
        for merchant_id in silent:
            await platform.register(receiver.url, merchant_id)
        async with platform.engine(max_in_flight=48, delivery_drain_seconds=0.1):
            for merchant_id in healthy:
                await platform.publish(merchant_id=merchant_id)
            await healthy_receiver.wait_for(4)
            for merchant_id in silent:
                await platform.publish_many(3, merchant_id)
            await response.wait_for(24)
            began = monotonic()
            for _ in range(5):
                for merchant_id in healthy:
                    await platform.publish_many(10, merchant_id)
            await healthy_receiver.wait_for(4 + 200)
            # A delivery behind a silent receiver would wait for its timeout of 30 s.
            assert monotonic() - began < 10
            assert response.most_held == 24
            assert (await queue_states(pool))["parked"] == 120 - 24


async def test_receiver_that_times_out_ends_with_one_slot(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = response = HeldResponse()
    async with platform.engine(
        delivery_timeout_seconds=0.3,
        retry_schedule_seconds=(600.0,),
        max_consecutive_failures=100,
        delivery_drain_seconds=0.1,
    ):
        await platform.publish_many(20)
        await response.wait_for(8)
    rows = await pool.fetch("SELECT started_at FROM attempts ORDER BY started_at")
    waits = [
        (after["started_at"] - before["started_at"]).total_seconds()
        for before, after in itertools.pairwise(rows)
    ]
    assert len(waits) >= 6
    assert max(waits[:3]) < 0.3
    assert min(waits[4:]) >= 0.3
