"""`deliver`: one engine process on a prefilled queue, compared with a bare aiohttp POST loop.

Both send the same payload to the same receiver over TLS with the same concurrency, in turn. Each
run of the engine is compared with the bare loops right before and after it, because the speed of a
machine changes within seconds.
"""

import asyncio
import json
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from benchmarks.drain import drained
from benchmarks.ledger import Ledger
from benchmarks.receiver import HELD, HELD_SECONDS
from benchmarks.rounds import rate_ratios
from benchmarks.stack import (
    Stack,
    free_port,
    insert_webhooks,
    receiver_certificate,
    running_stack,
    wait_until_listening,
)
from benchmarks.statements import counted

_ROUNDS = 3
_WEBHOOKS = 50
_IN_FLIGHT_PER_WEBHOOK = 4
_DELIVERIES_PER_SECOND = 5000

_MANY_IN_FLIGHT = 1000


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, int(seconds * _DELIVERIES_PER_SECOND)))


async def _measure(stack: Stack, count: int) -> dict[str, Any]:
    port = free_port()
    certificate = receiver_certificate(stack)
    url = f"https://127.0.0.1:{port}/hook"
    await insert_webhooks(stack, url, [f"m_{n}" for n in range(_WEBHOOKS)])
    concurrency = _WEBHOOKS * _IN_FLIGHT_PER_WEBHOOK
    with stack.process("benchmarks.receiver", str(port), str(certificate)):
        await wait_until_listening(port)
        bare, ours = [await _bare(stack, url, count, concurrency)], []
        for _ in range(_ROUNDS):
            ours.append(await _engine(stack, count))
            bare.append(await _bare(stack, url, count, concurrency))
        async with counted(stack) as statements:
            await _engine(stack, count // 4)
            executed = statements.of_ours()
    memory = await _memory(stack)
    ratios = rate_ratios(ours, bare)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "rate": round(_median(ours, "rate")),
        "bare_rate": round(_median(bare, "rate")),
        "engine_cpu_us": round(_median(ours, "engine_cpu_us")),
        "postgres_cpu_us": round(_median(ours, "postgres_cpu_us")),
        "bare_cpu_us": round(_median(bare, "cpu_us")),
        "statements_per_delivery": round(executed / (count // 4), 3),
        "rss_mb": round(memory["rss_mb"]),
        "rss_in_flight": memory["in_flight"],
        "deliveries": count,
        "concurrency": concurrency,
    }


def _median(runs: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


async def _bare(stack: Stack, url: str, count: int, concurrency: int) -> dict[str, float]:
    arguments = ("benchmarks.bare_post", url, str(stack.ca_file), str(count), str(concurrency))
    with stack.process(*arguments) as process:
        figures: dict[str, float] = json.loads(await stack.output(process))
    return figures


async def _engine(stack: Stack, count: int) -> dict[str, float]:
    settings = {
        "WEBHOOK_MAX_IN_FLIGHT": str(_WEBHOOKS * _IN_FLIGHT_PER_WEBHOOK),
        "WEBHOOK_MAX_IN_FLIGHT_PER_WEBHOOK": "32",
    }
    return await drained(stack, count, _WEBHOOKS, settings)


async def _memory(stack: Stack) -> dict[str, Any]:
    """Return the maximum memory of an engine with this many open requests, answered late."""
    port = free_port()
    path = stack.directory / "ledger"
    count = 3 * _MANY_IN_FLIGHT
    ledger = Ledger.create(path, 2 * count)
    certificate = str(receiver_certificate(stack))
    connection = await asyncpg.connect(stack.database_url)
    try:
        url = f"https://127.0.0.1:{port}/{HELD}"
        await connection.execute("UPDATE webhook_configs SET url = $1, version = version + 1", url)
    finally:
        await connection.close()
    with stack.process("benchmarks.receiver", str(port), certificate, str(path)):
        await wait_until_listening(port)
        settings = {"WEBHOOK_MAX_IN_FLIGHT": str(_MANY_IN_FLIGHT)}
        figures = await drained(stack, count, _WEBHOOKS, settings)
    arrivals = [receipt.received_at for receipt in ledger.since()]
    # Requests that arrived within the delay of one response were open together.
    most = max(bisect_right(arrivals, at + HELD_SECONDS) - n for n, at in enumerate(arrivals))
    return {"rss_mb": figures["rss_mb"], "in_flight": most}
