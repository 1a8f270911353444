"""`backlog`: the time of claim and settle by the number of open deliveries, and a drain.

Three databases of one PostgreSQL contain 1,000, 100,000 and 1,000,000 deliveries, all due, which is
the worst case for a claim. They run in turn, so that noise affects all three. Settled deliveries
are inserted again, so that each keeps its size. The drained queue grew while no engine ran, half of
it for a tenth of the configs. It is compared with the same deliveries as they arrive.
"""

import asyncio
import statistics
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import asyncpg
from pydantic import SecretStr

from benchmarks.drain import drained, prefill, trickled
from benchmarks.pipeline import running_server_and_receiver
from benchmarks.stack import Stack, insert_webhooks, running_stack
from core import queue
from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.postgres.pool import open_pool
from core.postgres.protocols import Pool
from core.queue import LeasedDelivery, Settlement
from core.settings import DatabaseSettings

_SIZES = (1_000, 100_000, 1_000_000)
_CLAIM = 200
_MERCHANTS = 50
_ROUNDS_PER_SECOND = 20
_DRAINED_PER_SECOND = 2000


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, seconds))


async def _measure(stack: Stack, seconds: float) -> dict[str, Any]:
    async with running_server_and_receiver(stack) as pipeline:
        url = f"https://127.0.0.1:{pipeline.receiver_port}/bare"
        await insert_webhooks(stack, url, [f"m_{n}" for n in range(_MERCHANTS)])
        count = int(seconds * _DRAINED_PER_SECOND)
        pairs = []
        for _ in range(2):
            normal = await trickled(stack, count, _MERCHANTS)
            after_outage = await drained(stack, count, _MERCHANTS, skewed=True)
            pairs.append((normal["rate"], after_outage["rate"]))
    claim_ms, settle_ms = await _claims(stack, int(seconds * _ROUNDS_PER_SECOND))
    smallest, *_, largest = _SIZES
    return {
        "claim_ms": claim_ms,
        "settle_ms": settle_ms,
        "claim_ratio": round(claim_ms[largest] / claim_ms[smallest], 2),
        "settle_ratio": round(settle_ms[largest] / settle_ms[smallest], 2),
        "per_second": {
            size: round(_CLAIM / (claim_ms[size] + settle_ms[size]) * 1000) for size in _SIZES
        },
        "smallest_claim_ms": claim_ms[smallest],
        "largest_claim_ms": claim_ms[largest],
        "claimed_at_once": _CLAIM,
        "drain_rate_ratio": round(statistics.median(after / normal for normal, after in pairs), 3),
        "normal_rate": round(statistics.median(normal for normal, _ in pairs)),
        "drain_rate": round(statistics.median(after for _, after in pairs)),
        "drained": count,
    }


async def _claims(stack: Stack, rounds: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return the median milliseconds of a claim and of its settle, by size."""
    claims: dict[int, list[float]] = {size: [] for size in _SIZES}
    settles: dict[int, list[float]] = {size: [] for size in _SIZES}
    async with AsyncExitStack() as cleanup:
        pools = {}
        for size in _SIZES:
            pools[size] = await _filled(stack, size)
            cleanup.push_async_callback(pools[size].close)
        for _ in range(rounds):
            for size, pool in pools.items():
                began = perf_counter()
                deliveries = await queue.claim(pool, _CLAIM, lease_seconds=75)
                claimed = perf_counter()
                async with pool.acquire() as connection, connection.transaction():
                    await queue.settle(connection, [_delivered(d) for d in deliveries], 10)
                settled = perf_counter()
                if len(deliveries) != _CLAIM:
                    raise RuntimeError(f"claimed {len(deliveries)} of {size} due deliveries")
                claims[size].append(claimed - began)
                settles[size].append(settled - claimed)
                await prefill(pool, _CLAIM, _MERCHANTS)
    return _medians(claims), _medians(settles)


async def _filled(stack: Stack, size: int) -> Pool:
    """A database with this many open deliveries, all due."""
    name = f"backlog_{size}"
    connection = await asyncpg.connect(stack.database_url)
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
    await connection.close()
    url = stack.postgres.url(name)
    connection = await asyncpg.connect(url)
    await prefill(connection, size, _MERCHANTS)
    await connection.execute("VACUUM ANALYZE events, delivery_queue", timeout=300)
    await connection.close()
    settings = DatabaseSettings(database_url=SecretStr(url))
    return await open_pool(settings, "benchmark", 2)


def _delivered(delivery: LeasedDelivery) -> Settlement:
    return Settlement(
        delivery_id=delivery.id,
        lease_id=delivery.lease_id,
        webhook_id=delivery.webhook_id,
        merchant_id=delivery.merchant_id,
        due_since=delivery.due_since,
        number=delivery.attempt_count + 1,
        started_at=datetime.now(UTC),
        result=AttemptResult(Outcome.SUCCEEDED, 200, "", duration_us=1000),
        final_state=DeliveryState.DELIVERED,
    )


def _medians(values: dict[int, list[float]]) -> dict[int, float]:
    return {size: round(statistics.median(v) * 1000, 2) for size, v in values.items()}
