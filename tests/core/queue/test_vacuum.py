"""An engine vacuums the dead rows of the queue."""

import asyncio
from typing import Any

from core import queue
from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.platform import Platform


async def leave_dead(pool: Any, count: int) -> None:
    """Delete rows from the queue and update the statistics."""
    await pool.execute("ALTER TABLE delivery_queue SET (autovacuum_enabled = false)")
    await make_webhook_config(pool)
    await enqueue_events(pool, count)
    async with pool.acquire() as connection:
        await connection.execute("DELETE FROM delivery_queue")
        await connection.execute("SELECT pg_stat_force_next_flush()")
    await until_dead(pool, count)


async def until_dead(pool: Any, count: int) -> None:
    query = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'delivery_queue'"
    async with asyncio.timeout(10):
        while await pool.fetchval(query) != count:
            pass


async def test_few_dead_rows_are_left_to_autovacuum(pool: Any) -> None:
    await leave_dead(pool, 100)
    assert not await queue.has_many_dead(pool)


async def test_engine_vacuums_many_dead_rows(platform: Platform, pool: Any) -> None:
    await leave_dead(pool, 6_000)
    assert await queue.has_many_dead(pool)
    # Some may remain, because VACUUM skips a page that a claim reads.
    async with platform.engine(), asyncio.timeout(10):
        while await queue.has_many_dead(pool):
            pass


async def test_vacuum_does_not_wait_for_another(pool: Any) -> None:
    async with pool.acquire() as connection, connection.transaction():
        # VACUUM takes the same lock.
        await connection.execute("LOCK TABLE delivery_queue IN SHARE UPDATE EXCLUSIVE MODE")
        async with asyncio.timeout(5):
            await queue.vacuum(pool)
