"""An engine whose database drops sessions, or whose rows another session locks."""

import asyncio
import dataclasses
from time import monotonic
from typing import Any

from core.lifecycle import DeliveryState
from core.settings import DatabaseSettings
from delivery.fairness.concurrency import INITIAL_LIMIT
from tests.support.event_log import EventLog
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import finished_states, queue_states, until
from tests.support.receiver import Receiver


async def test_notify_wakes_engine_before_poll(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    async with platform.engine(poll_seconds=1.0):
        began = monotonic()
        for count in range(1, 6):
            await platform.publish()
            await receiver.wait_for(count)
        # Each event comes just after a poll, so polls alone would take five seconds.
        assert monotonic() - began < 2.5


async def test_dropped_database_sessions_lose_nothing(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    async def drop_sessions() -> None:
        assert await pool.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'postrider-delivery' AND datname = current_database()"
        )

    await platform.register(receiver.url)
    receiver.default = response = HeldResponse()
    async with platform.engine(delivery_timeout_seconds=2, lease_seconds=4):
        published = await platform.publish_many(50)
        await response.wait_for(INITIAL_LIMIT)
        await drop_sessions()
        response.release()
        published += await platform.publish_many(100)
        await receiver.wait_for(60, timeout=8)
        await drop_sessions()
        # A lease that expired meanwhile causes a duplicate, so the count alone is not enough.
        async with asyncio.timeout(20):
            while missing := len(set(published) - set(receiver.message_ids)):
                await receiver.wait_for(len(receiver.webhooks) + missing)
        await log.wait_for("listen_reopened")
    assert "has ended" in log.named("listen_reopened")[0]["error"]
    assert set(receiver.message_ids) == set(published)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 150}
    assert not await queue_states(pool)
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 150


def limit_statements(platform: Platform, seconds: float) -> None:
    """Set the statement timeout of later engines. Their lock timeout is half of it."""
    platform.settings = dataclasses.replace(
        platform.settings,
        database=DatabaseSettings(
            database_url=platform.settings.database.database_url,
            database_statement_timeout_seconds=seconds,
        ),
    )


async def test_settle_waits_for_locked_row(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    limit_statements(platform, 0.4)
    receiver.default = response = HeldResponse()
    async with platform.engine():
        await platform.publish()
        await response.wait_for(1)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT FROM delivery_queue FOR UPDATE")
            response.release()
            await log.wait_for("settle_postponed")
        await platform.publish(merchant_id="m_2")
        await receiver.wait_for(2)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 2}
    assert len(receiver.webhooks) == 2


async def test_many_locked_rows_delay_others_by_one_lock_wait(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    async def until_delivered(count: int) -> None:
        async def delivered() -> bool:
            return await finished_states(pool) == {DeliveryState.DELIVERED: count}

        await until(delivered)

    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    limit_statements(platform, 1)
    response = HeldResponse()
    async with platform.engine():
        # Thirty successes raise the config's limit to the number of the locked rows.
        await platform.publish_many(30)
        await until_delivered(30)
        receiver.default = response
        await platform.publish_many(30)
        await response.wait_for(30)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT FROM delivery_queue FOR UPDATE")
            response.release()
            await log.wait_for("settle_postponed")
            began = monotonic()
            for count in range(1, 4):
                await platform.publish(merchant_id="m_2")
                await until_delivered(30 + count)
            # With a lock wait per row, each of the three would take 15 s.
            assert monotonic() - began < 10
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 63}
    assert len(receiver.webhooks) == 63
