"""Runs that are interrupted, and changes by other sessions during a run."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import asyncpg
import pytest

from core import queue, retention
from core.lifecycle import DeliveryState, Outcome
from core.retention import move, partitions
from core.retention import run as run_module
from tests.conftest import database_settings
from tests.support.factories import (
    MERCHANT,
    make_event,
    make_webhook_config,
    settle,
    settlement,
)
from tests.support.past_rows import day_of, make_days, past_delivery, past_pending
from tests.support.retention import SETTINGS, assert_sound, ids, partition_of, run_retention


class KilledError(Exception):
    """Stands for the end of the process."""


class MortalConnection:
    """Breaks instead of executing statement number `statements`, as after kill -9."""

    def __init__(self, connection: Any, statements: int):
        self._connection = connection
        self._statements_left = statements

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if name not in ("execute", "fetch", "fetchrow", "fetchval"):
            return found

        async def mortal(*arguments: Any) -> Any:
            self._statements_left -= 1
            if self._statements_left < 0:
                self._connection.terminate()
                raise KilledError
            return await found(*arguments)

        return mortal


@pytest.mark.slow
async def test_run_continues_after_a_kill_at_any_statement(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 39)
    for days_ago in (100, 40, 39):
        await past_delivery(pool, webhook_id, days_ago)
        await past_delivery(pool, webhook_id, days_ago, "failed")
        await past_pending(pool, webhook_id, days_ago)
    monkeypatch.setattr(partitions, "DAYS_AHEAD", 1)
    open_session, statements = run_module._open_session, itertools.count()

    @asynccontextmanager
    async def open_mortal_session(database: Any) -> AsyncIterator[Any]:
        async with open_session(database) as connection:
            yield MortalConnection(connection, next(statements))

    monkeypatch.setattr(run_module, "_open_session", open_mortal_session)
    killed = 0
    while True:
        try:
            # PostgreSQL releases the advisory lock when it notices the closed connection.
            async with asyncio.timeout(5):
                while await retention.run_once(database_settings(database_url), SETTINGS) is None:
                    pass
        except (KilledError, asyncpg.InterfaceError):
            killed += 1
            await assert_sound(pool)
        else:
            break

    # Each run continues the previous one, so there are fewer kills than statements of a full run.
    assert killed > 20
    assert await pool.fetchval("SELECT count(*) FROM finished_deliveries") == 2
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 2
    assert await pool.fetchval("SELECT count(*) FROM events") == 5
    assert await pool.fetchval("SELECT count(completed_at) FROM retention_runs") > 0
    left = await partitions.list_partitions(pool)
    assert not [partition for partition in left if partition.day.date < day_of(30).date]


async def test_one_process_runs_at_a_time(pool: Any, database_url: str) -> None:
    settings = database_settings(database_url)
    reports = await asyncio.gather(*(retention.run_once(settings, SETTINGS) for _ in range(4)))

    assert len([report for report in reports if report is not None]) == 1
    # The lock is free again.
    await run_retention(database_url)


async def test_delivery_finished_during_the_move_is_kept(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    delivery_id, _ = await past_pending(pool, webhook_id, 40, state="ready")
    [delivery] = await queue.claim(pool, 1, 60)
    move_history = move.move_history
    moved: list[int] = []

    async def move_then_fail(*arguments: Any, **options: Any) -> int:
        count = await move_history(*arguments, **options)
        if not moved:
            await settle(
                pool,
                settlement(delivery, outcome=Outcome.TIMEOUT, final_state=DeliveryState.FAILED),
            )
        moved.append(count)
        return count

    monkeypatch.setattr(move, "move_history", move_then_fail)
    await run_retention(database_url)

    assert moved == [0, 1]
    partition = await partition_of(pool, "finished_deliveries", delivery_id)
    assert partition == "finished_deliveries_kept"
    assert await partition_of(pool, "attempts", delivery_id, "delivery_id") == "attempts_kept"
    await assert_sound(pool)


async def test_event_of_a_concurrent_redelivery_is_kept(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_retention(database_url)
    webhook_id = await make_webhook_config(pool)
    delivery_id, event_id = await past_delivery(pool, webhook_id, 40)
    lock_conflict = asyncio.Event()
    retry = partitions.retry_lock_conflicts

    async def retry_noting_conflicts(call: Any, *arguments: Any) -> Any:
        async def noting(*given: Any) -> Any:
            try:
                return await call(*given)
            except asyncpg.LockNotAvailableError:
                lock_conflict.set()
                raise

        return await retry(noting, *arguments)

    monkeypatch.setattr(partitions, "retry_lock_conflicts", retry_noting_conflicts)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        redelivery = await queue.redeliver(connection, MERCHANT, delivery_id)
        running = asyncio.create_task(run_retention(database_url))
        await asyncio.wait_for(lock_conflict.wait(), 10)
        await transaction.commit()
        await running

    assert await ids(pool, "finished_deliveries") == set()
    assert await ids(pool, "delivery_queue") == {redelivery}
    assert await ids(pool, "events") == {event_id}


async def test_erasure_during_the_move_is_kept(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    _, event_id = await past_delivery(pool, webhook_id, 40, "failed")
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "UPDATE events SET payload = '', content_type = '' WHERE id = $1", event_id
        )
        running = asyncio.create_task(run_retention(database_url))
        # Until retention waits for the lock on the event.
        async with asyncio.timeout(10):
            while not await pool.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                pass
    await running

    assert await pool.fetchval("SELECT payload FROM events") == b""
    assert await partition_of(pool, "events", event_id) == "events_kept"


@pytest.mark.slow
async def test_run_barely_delays_publishers_and_engines(pool: Any, database_url: str) -> None:
    """Their slowest statement waits as long as retention waits for its locks."""
    webhook_id = await make_webhook_config(pool)
    past = range(35, 45)
    await make_days(pool, *past)
    for days_ago in past:
        for state in ("delivered", "failed"):
            await past_delivery(pool, webhook_id, days_ago, state)
    slowest, sent, stop = 0.0, 0, asyncio.Event()

    async def deliver_until_stopped() -> None:
        nonlocal slowest, sent
        while not stop.is_set():
            for step in (enqueue_one, claim_and_settle):
                began = monotonic()
                await step()
                slowest = max(slowest, monotonic() - began)
            sent += 1

    async def enqueue_one() -> None:
        await queue.enqueue(pool, [make_event()])

    async def claim_and_settle() -> None:
        async with pool.acquire() as connection, connection.transaction():
            # The lock timeout of all our connections. Exceeding it fails the test.
            await connection.execute("SET LOCAL lock_timeout = '5s'")
            leased = await queue.claim(connection, 10, 60)
            await queue.settle(connection, [settlement(one) for one in leased], 10)

    working = [asyncio.create_task(deliver_until_stopped()) for _ in range(4)]
    report = await run_retention(database_url)
    stop.set()
    await asyncio.gather(*working)

    assert len(report.days_dropped) == 3 * len(past)
    created = (report.days_waiting, len(report.days_made))
    assert created in (([str(day_of(0).date)], 7), ([], 8))
    assert sent > 20
    # The locks of three tables, and 1 s for a slow machine.
    assert slowest < 3 * partitions.LOCK_SECONDS + 1.0, slowest
    assert await pool.fetchval("SELECT count(*) FROM events") >= sent
    await assert_sound(pool)
