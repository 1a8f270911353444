"""`ingest`: one server process on PostgreSQL with real fsync, compared with an empty handler.

Unary calls alternate with an empty grpc.aio handler in many short rounds, with the same client and
concurrency. Each round is compared with the rounds of the empty handler right before and after it,
and the median of these ratios counts. The concurrency is high enough that the CPU limits both. With
half of it, callers that wait for a commit leave cores idle, which is a separate figure. Each event
has one delivery. No engine runs.
"""

import asyncio
import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.history import history_figures
from benchmarks.publisher import BATCH, MERCHANTS
from benchmarks.rounds import rate_ratios
from benchmarks.stack import (
    Stack,
    cpu_seconds,
    cpu_seconds_of_postgres,
    free_port,
    insert_webhooks,
    running_stack,
    wait_until_listening,
)

_ROUNDS = 3
_UNARY_ROUNDS = 15
_UNARY_CALLS = 128
_HALF_ROUNDS = 5
_BATCH_CALLS = 8

type Figures = dict[str, float]


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, seconds))


async def _measure(stack: Stack, seconds: float) -> dict[str, Any]:
    merchants = [f"m_{n}" for n in range(MERCHANTS)]
    await insert_webhooks(stack, "https://127.0.0.1:1/never-called", merchants)
    with _empty_server(stack) as empty, _server(stack) as ours:
        await wait_until_listening(empty[1])
        await wait_until_listening(ours[1])

        async def in_turn(calls: int, rounds: int) -> tuple[list[Figures], list[Figures]]:
            bare, unary = [await _publish(stack, empty, "unary", seconds / 2, calls)], []
            for _ in range(rounds):
                unary.append(await _publish(stack, ours, "unary", seconds / 2, calls))
                bare.append(await _publish(stack, empty, "unary", seconds / 2, calls))
            return unary, bare

        unary, bare = await in_turn(_UNARY_CALLS, _UNARY_ROUNDS)
        half = rate_ratios(*await in_turn(_UNARY_CALLS // 2, _HALF_ROUNDS))
        batch = [
            await _publish(stack, ours, "batch", seconds, _BATCH_CALLS) for _ in range(_ROUNDS)
        ]
        stream = [await _publish(stack, ours, "stream", seconds, 1) for _ in range(_ROUNDS)]
        lists = await history_figures(stack, ours[1])
    ratios = rate_ratios(unary, bare)
    return {
        "unary_ratio": round(statistics.median(ratios), 3),
        "batch_events_per_s": round(_median(batch, "rate")),
        "stream_events_per_s": round(_median(stream, "rate")),
        "list_p95_ms": lists["p95_ms"],
        "unary_ratios": [round(ratio, 3) for ratio in ratios],
        "unary_ratio_half_the_calls": round(statistics.median(half), 3),
        "unary_ratios_half_the_calls": [round(ratio, 3) for ratio in half],
        "unary_events_per_s": round(_median(unary, "rate")),
        "empty_calls_per_s": round(_median(bare, "rate")),
        "empty_server_cpu_us": round(_median(bare, "server_cpu_us")),
        **_cpu("unary", unary),
        **_cpu("batch", batch),
        **_cpu("stream", stream),
        "list_p50_ms": lists["p50_ms"],
        "list_p95_ms_by_filter": lists["by_filter"],
        "history_deliveries": lists["deliveries"],
        "batch_size": BATCH,
        "unary_calls_at_once": _UNARY_CALLS,
        "batch_calls_at_once": _BATCH_CALLS,
    }


def _median(rounds: list[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def _cpu(kind: str, rounds: list[Figures]) -> dict[str, int]:
    names = ("server_cpu_us", "postgres_cpu_us", "client_cpu_us")
    return {f"{kind}_{name}": round(_median(rounds, name)) for name in names}


@contextmanager
def _server(stack: Stack) -> Iterator[tuple[int, int]]:
    port = free_port()
    with stack.process("server", WEBHOOK_LISTEN_ADDRESS=f"127.0.0.1:{port}") as process:
        yield process.pid, port


@contextmanager
def _empty_server(stack: Stack) -> Iterator[tuple[int, int]]:
    port = free_port()
    with stack.process("benchmarks.empty_server", str(port)) as process:
        yield process.pid, port


async def _publish(
    stack: Stack, server: tuple[int, int], kind: str, seconds: float, concurrency: int
) -> Figures:
    """Return events per second, and microseconds of CPU per event."""
    pid, port = server
    arguments = (kind, str(port), stack.token("events:publish"), str(seconds), str(concurrency))
    with stack.process("benchmarks.publisher", *arguments) as process:
        await _line(process)
        before = cpu_seconds(pid), cpu_seconds_of_postgres(stack.postgres.process.pid)
        published = json.loads(await _line(process))
        after = cpu_seconds(pid), cpu_seconds_of_postgres(stack.postgres.process.pid)
        # Before the end signal, so that open calls end too.
        await asyncio.to_thread(process.wait, 30)
    accepted = published["accepted"]
    if not accepted:
        raise RuntimeError(f"no {kind} call was answered within {seconds:g} s")
    return {
        "rate": accepted / published["seconds"],
        "server_cpu_us": (after[0] - before[0]) / accepted * 1e6,
        "postgres_cpu_us": (after[1] - before[1]) / accepted * 1e6,
        "client_cpu_us": published["cpu"] / accepted * 1e6,
    }


async def _line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout
    line = await asyncio.to_thread(process.stdout.readline)
    if not line:
        raise RuntimeError("the publisher ended early; what it said is above")
    return line
