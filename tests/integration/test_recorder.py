"""The recorder: what is told to it while it writes is written next."""

import asyncio
from typing import Any
from uuid import UUID

from core.queue import BreakerChange
from delivery.config import DeliverySettings
from delivery.measures import EngineMeasures
from delivery.record import Recorder
from tests.factories import failed, lease_one, make_webhook_config, promptly, until_blocked


async def is_open(pool: Any, webhook_id: UUID) -> bool:
    return bool(
        await pool.fetchval(
            "SELECT breaker_open_until IS NOT NULL FROM webhook_configs WHERE id = $1", webhook_id
        )
    )


async def test_keeps_a_breaker_change_that_came_while_another_was_written(pool: Any) -> None:
    held, other = await make_webhook_config(pool), await make_webhook_config(pool)
    first, second = await lease_one(pool, held), await lease_one(pool, other)
    recorder = Recorder(pool, DeliverySettings(), EngineMeasures(0), lambda _batch, _settled: None)
    recorder.put(failed(first), BreakerChange(held, None, trips=True))

    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM webhook_configs WHERE id = $1 FOR NO KEY UPDATE", held
            )
            flushing = asyncio.create_task(recorder.flush())
            await until_blocked(pool)
            recorder.put(failed(second), BreakerChange(other, None, trips=True))
        await promptly(flushing)

    assert await is_open(pool, held)
    assert await is_open(pool, other)
