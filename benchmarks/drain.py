"""Fills a queue, and lets engines drain it without a server and a producer."""

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

import asyncpg

from benchmarks.payload import PAYLOAD
from benchmarks.pipeline import engines_listening
from benchmarks.stack import (
    Stack,
    children_of,
    cpu_seconds,
    cpu_seconds_of_postgres,
    rss_megabytes,
)
from core import queue
from core.postgres.pool import met_new_partition

_PREFILL = """
WITH numbered AS (
    SELECT n, new_uuid7() AS event_id,
        'm_' || CASE WHEN $4 AND n % 2 = 0 THEN n / 2 % ($2 / 10) ELSE n % $2 END AS merchant_id
    FROM generate_series(1, $1::int) n
), stored AS (
    INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count)
    SELECT event_id, merchant_id, 'payment.succeeded', 'application/json', $3, 1 FROM numbered
)
INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state)
SELECT new_uuid7(), c.id, e.event_id, e.merchant_id, 'payment.succeeded', 'ready'
FROM numbered e JOIN webhook_configs c ON c.merchant_id = e.merchant_id
ORDER BY e.n
"""
_OPEN = "SELECT EXISTS (SELECT 1 FROM delivery_queue)"
_FEW_OPEN = "SELECT count(*) < $1 FROM delivery_queue"
_TRICKLE = 500
_LOOK_SECONDS = 0.05


async def prefill(connection: Any, count: int, merchants: int, *, skewed: bool = False) -> None:
    """Insert `count` events with a ready delivery each, for the merchants `m_0`, `m_1`, … in turn.

    With `skewed`, every second event is for the first tenth of the merchants.
    """
    arguments = (count, merchants, PAYLOAD, skewed)
    try:
        await connection.execute(_PREFILL, *arguments, timeout=600)
    except asyncpg.CheckViolationError as error:
        # A new engine creates the partitions.
        if not met_new_partition(error):
            raise
        await connection.execute(_PREFILL, *arguments, timeout=600)


async def drained(
    stack: Stack,
    count: int,
    merchants: int,
    settings: Mapping[str, str] = {},
    *,
    processes: int = 1,
    skewed: bool = False,
) -> dict[str, float]:
    """Return rate, microseconds of CPU per delivery, and the maximum memory of an engine."""
    postmaster = stack.postgres.process.pid
    connection = await asyncpg.connect(stack.database_url)
    command = ("delivery", f"--processes={processes}")
    try:
        with stack.process(*command, **settings) as process:
            await engines_listening(connection, processes, process)
            engines = children_of(process.pid) if processes > 1 else [process.pid]
            # Stopped while the queue fills, so that they start with all of it.
            _send(engines, signal.SIGSTOP)
            await prefill(connection, count, merchants, skewed=skewed)
            await connection.execute("VACUUM ANALYZE delivery_queue")
            await queue.notify(connection)
            before = sum(map(cpu_seconds, engines)), cpu_seconds_of_postgres(postmaster)
            began = asyncio.get_running_loop().time()
            _send(engines, signal.SIGCONT)
            while await connection.fetchval(_OPEN):
                await asyncio.sleep(_LOOK_SECONDS)
            seconds = asyncio.get_running_loop().time() - began
            after = sum(map(cpu_seconds, engines)), cpu_seconds_of_postgres(postmaster)
            rss = max(map(rss_megabytes, engines))
    finally:
        await connection.close()
    return {
        "rate": count / seconds,
        "seconds": seconds,
        "engine_cpu_us": (after[0] - before[0]) / count * 1e6,
        "postgres_cpu_us": (after[1] - before[1]) / count * 1e6,
        "rss_mb": rss,
        "processes": processes,
    }


async def trickled(stack: Stack, count: int, merchants: int) -> dict[str, float]:
    """Return the rate of the same skewed deliveries with at most one second's work open."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        with stack.process("delivery") as process:
            await engines_listening(connection, 1, process)
            began = asyncio.get_running_loop().time()
            for _ in range(count // _TRICKLE):
                await prefill(connection, _TRICKLE, merchants, skewed=True)
                await queue.notify(connection)
                while not await connection.fetchval(_FEW_OPEN, 2 * _TRICKLE):
                    await asyncio.sleep(_LOOK_SECONDS / 5)
            while await connection.fetchval(_OPEN):
                await asyncio.sleep(_LOOK_SECONDS / 5)
            seconds = asyncio.get_running_loop().time() - began
    finally:
        await connection.close()
    return {"rate": count // _TRICKLE * _TRICKLE / seconds, "seconds": seconds}


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)
