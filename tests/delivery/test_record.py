"""The recorder: results put during a flush, and configs that another session locks."""

import asyncio
from time import monotonic
from typing import Any
from uuid import UUID

import asyncpg

from core.queue import BreakerChange
from delivery.metrics import EngineMetrics
from delivery.record import Recorder
from delivery.settings import DeliverySettings
from tests.support.factories import (
    failed,
    lease_one,
    make_webhook_config,
    promptly,
    rescheduled,
    until_blocked,
)


def new_recorder(pool: Any) -> Recorder:
    return Recorder(pool, DeliverySettings(), EngineMetrics(), lambda _batch, _settled: None)


async def is_open(pool: Any, webhook_id: UUID) -> bool:
    return bool(
        await pool.fetchval(
            "SELECT breaker_open_until IS NOT NULL FROM webhook_configs WHERE id = $1", webhook_id
        )
    )


async def test_recorder_keeps_breaker_change_put_during_flush(pool: Any) -> None:
    locked, other = await make_webhook_config(pool), await make_webhook_config(pool)
    first, second = await lease_one(pool, locked), await lease_one(pool, other)
    recorder = new_recorder(pool)
    recorder.put(failed(first), BreakerChange(locked, None, trips=True))

    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM webhook_configs WHERE id = $1 FOR NO KEY UPDATE", locked
            )
            flushing = asyncio.create_task(recorder.flush())
            await until_blocked(pool)
            recorder.put(failed(second), BreakerChange(other, None, trips=True))
        await promptly(flushing)

    assert await is_open(pool, locked)
    assert await is_open(pool, other)


async def test_locked_config_does_not_delay_other_breakers(pool: Any, database_url: str) -> None:
    locked, *others = [await make_webhook_config(pool) for _ in range(4)]
    waits = {"lock_timeout": "2000"}
    async with asyncpg.create_pool(database_url, min_size=1, server_settings=waits) as bounded:
        recorder = new_recorder(bounded)

        async def fail_and_flush(*webhook_ids: UUID) -> float:
            for webhook_id in webhook_ids:
                settlement = rescheduled(await lease_one(pool, webhook_id))
                recorder.put(settlement, BreakerChange(webhook_id, None, trips=True))
            began = monotonic()
            await promptly(recorder.flush())
            assert not recorder.pending
            return monotonic() - began

        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT FROM webhook_configs WHERE id = $1 FOR UPDATE", locked)
            await fail_and_flush(locked, others[0])
            assert await is_open(pool, others[0])
            assert await fail_and_flush(others[1]) < 1
            assert await is_open(pool, others[1])
            assert not await is_open(pool, locked)
        await fail_and_flush(others[2])
        assert await is_open(pool, others[2])
        assert await is_open(pool, locked)
