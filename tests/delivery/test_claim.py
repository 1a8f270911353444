"""The claim stage: a claim that is answered late or not at all is released."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from core import queue
from core.ids import new_id
from delivery.claim import Claim, UnansweredClaims, claim
from delivery.metrics import EngineMetrics
from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.platform import Platform
from tests.support.receiver import Receiver

LEASE_SECONDS = 60.0


async def enqueue(pool: Any, count: int) -> None:
    await make_webhook_config(pool)
    await enqueue_events(pool, count)


async def claim_answered_after(seconds: float, pool: Any, monkeypatch: pytest.MonkeyPatch) -> Claim:
    monkeypatch.setattr("delivery.claim.monotonic", iter([0, seconds]).__next__)
    return await claim(pool, 10, LEASE_SECONDS, EngineMetrics(), UnansweredClaims())


async def test_claim_answered_late_is_released(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await enqueue(pool, 3)
    late = await claim_answered_after(LEASE_SECONDS / 2 + 1, pool, monkeypatch)

    assert (late.taken, list(late.deliveries)) == (3, [])
    assert len(await queue.claim(pool, 10, LEASE_SECONDS)) == 3


async def test_claim_within_half_a_lease_is_kept(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enqueue(pool, 3)
    claimed = await claim_answered_after(LEASE_SECONDS / 2 - 1, pool, monkeypatch)

    assert len(claimed.deliveries) == 3


class PoolWithoutAnswers:
    """Executes statements, and loses their results."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["PoolWithoutAnswers"]:
        yield self

    async def fetch(self, *arguments: Any) -> Any:
        await self._pool.fetch(*arguments)
        raise ConnectionResetError


async def test_unanswered_claim_is_released(pool: Any) -> None:
    await enqueue(pool, 3)
    unanswered = UnansweredClaims()
    without_answers: Any = PoolWithoutAnswers(pool)
    with pytest.raises(ConnectionResetError):
        await claim(without_answers, 2, LEASE_SECONDS, EngineMetrics(), unanswered)
    # A delivery that another engine claimed meanwhile keeps its lease.
    [other] = await queue.claim(pool, 10, LEASE_SECONDS)

    assert await unanswered.release(pool) == 2
    ready = await queue.claim(pool, 10, LEASE_SECONDS)
    assert (len(ready), other.id in {delivery.id for delivery in ready}) == (2, False)


async def test_locked_delivery_is_released_by_a_later_sweep(pool: Any) -> None:
    await enqueue(pool, 2)
    lease_id, unanswered = new_id(), UnansweredClaims()
    unanswered.add(lease_id)
    [locked, _] = await queue.claim(pool, 2, LEASE_SECONDS, lease_id)
    async with pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM delivery_queue WHERE id = $1 FOR UPDATE", locked.id)
        async with asyncio.timeout(10):
            assert await unanswered.release(pool) == 1
    assert await unanswered.release(pool) == 1


async def test_late_claim_is_searched_for_a_limited_time(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delivery.claim._SWEEPS", 3)
    await enqueue(pool, 1)
    lease_id, unanswered = new_id(), UnansweredClaims()
    unanswered.add(lease_id)
    assert await unanswered.release(pool) == 0
    for released in (1, 1, 0):
        await queue.claim(pool, 1, LEASE_SECONDS, lease_id)
        assert await unanswered.release(pool) == released


async def test_unanswered_claim_is_sent_before_lease_ends(
    platform: Platform, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = queue.claim
    lost: list[queue.LeasedDelivery] = []

    async def lose_the_first(*arguments: Any) -> Any:
        leased = await genuine(*arguments)
        if leased and not lost:
            lost.extend(leased)
            raise ConnectionResetError
        return leased

    monkeypatch.setattr(queue, "claim", lose_the_first)
    await platform.register(receiver.url)
    await platform.publish()
    async with platform.engine(lease_seconds=LEASE_SECONDS):
        await receiver.wait_for(1, timeout=LEASE_SECONDS / 2)
    assert len(lost) == 1
