"""An engine that stops: with open requests, after its drain time, and without a database."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from core.lifecycle import DeliveryState
from delivery.claim import claim
from tests.support.event_log import EventLog
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform, running_platform
from tests.support.queue_state import finished_states, queue_states
from tests.support.receiver import Receiver
from tests.support.restartable_postgres import RestartablePostgres


async def test_stop_waits_for_open_requests_and_claims_no_more(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    await platform.register(receiver.url)
    receiver.default = response = HeldResponse()
    async with AsyncExitStack() as engine:
        await engine.enter_async_context(platform.engine(max_in_flight_per_webhook=4))
        published = await platform.publish_many(10)
        await response.wait_for(4)
        stopping = asyncio.create_task(engine.aclose())
        await log.wait_for("draining")
        assert not stopping.done()
        response.release()
        await asyncio.wait_for(stopping, 20)

    assert len(receiver.webhooks) == 4
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 4}
    # No lease is left, so that another engine may claim the rest at once.
    assert (await queue_states(pool))[DeliveryState.LEASED] == 0
    async with platform.engine():
        await receiver.wait_for(10)
    assert sorted(receiver.message_ids) == sorted(published)


async def test_stop_releases_unfinished_after_drain_time(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = response = HeldResponse()
    async with platform.engine(delivery_drain_seconds=0.5):
        published = await platform.publish_many(3)
        await response.wait_for(3)
        stopped_at = monotonic()
    assert 0.5 <= monotonic() - stopped_at < 5
    assert await queue_states(pool) == {DeliveryState.READY: 3}
    rows = await pool.fetch("SELECT attempt_count, reclaim_count FROM delivery_queue")
    assert [tuple(row) for row in rows] == [(0, 0)] * 3
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 0

    receiver.default = 200
    async with platform.engine():
        began = monotonic()
        await receiver.wait_for(6)
        assert monotonic() - began < 10, "the engine waited for the lease of 75 s"
    assert Counter(receiver.message_ids) == dict.fromkeys(published, 2)


async def test_idle_engine_stops_at_once(platform: Platform) -> None:
    async with platform.engine(poll_seconds=1.0):
        began = monotonic()
    assert monotonic() - began < 0.8


@pytest.fixture
async def short_timeouts(
    restartable_postgres: RestartablePostgres,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Platform]:
    """A server whose database may go away, with timeouts of 0.5 s."""
    assert restartable_postgres.server is not None
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("WEBHOOK_DATABASE_CONNECT_TIMEOUT_SECONDS", "0.5")
    async with running_platform(restartable_postgres.server.url(), ca_file, tmp_path) as platform:
        yield platform


@contextmanager
def _stopped(restartable_postgres: RestartablePostgres) -> Iterator[None]:
    restartable_postgres.stop()
    try:
        yield
    finally:
        restartable_postgres.start()


@pytest.mark.parametrize("unavailable", [_stopped, RestartablePostgres.frozen])
async def test_stop_without_database_leaves_results_to_leases(
    restartable_postgres: RestartablePostgres,
    short_timeouts: Platform,
    receiver: Receiver,
    *,
    log: EventLog,
    unavailable: Callable[[RestartablePostgres], AbstractContextManager[None]],
) -> None:
    merchant_id = unavailable.__name__.strip("_")
    await short_timeouts.register(receiver.url, merchant_id)
    receiver.default = response = HeldResponse()
    async with AsyncExitStack() as engine:
        await engine.enter_async_context(short_timeouts.engine(delivery_drain_seconds=1.0))
        await short_timeouts.publish(merchant_id=merchant_id)
        await response.wait_for(1)
        with unavailable(restartable_postgres):
            began = monotonic()
            stopping = asyncio.create_task(engine.aclose())
            response.release()
            await asyncio.wait_for(stopping, 15)
            assert monotonic() - began < 12
    [entry] = log.named("results_left_to_leases")
    assert entry["deliveries"] == 1


@pytest.mark.parametrize(
    ("answered", "expected"), [(True, "results_left_to_leases"), (False, "release_failed")]
)
async def test_unanswered_statements_do_not_lengthen_drain(
    restartable_postgres: RestartablePostgres,
    *,
    receiver: Receiver,
    ca_file: Path,
    tmp_path: Path,
    log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
    answered: bool,
    expected: str,
) -> None:
    assert restartable_postgres.server is not None
    claiming = asyncio.Event()

    def signalling_claim(*arguments: Any) -> Any:
        claiming.set()
        return claim(*arguments)

    monkeypatch.setattr("delivery.engine.claim", signalling_claim)
    merchant_id = f"silent_{answered}"
    receiver.default = response = HeldResponse()
    # With the default timeouts the claim under way would take longer than the drain.
    async with (
        running_platform(restartable_postgres.server.url(), ca_file, tmp_path) as platform,
        AsyncExitStack() as engine,
    ):
        await platform.register(receiver.url, merchant_id)
        await engine.enter_async_context(platform.engine(delivery_drain_seconds=1.0))
        await platform.publish(merchant_id=merchant_id)
        await response.wait_for(1)
        with restartable_postgres.frozen():
            claiming.clear()
            await asyncio.wait_for(claiming.wait(), 10)
            began = monotonic()
            stopping = asyncio.create_task(engine.aclose())
            if answered:
                response.release()
            await asyncio.wait_for(stopping, 40)
            # Two drains of 1 s, and 2 s for closing the connections.
            assert monotonic() - began < 8
        response.release()
    assert log.named(expected)
