"""`processes`: 1, 2 and 4 engines of one supervisor on a prefilled queue, and the limit.

Rounds in turn, with the same total number of open requests, so that each opens as many connections.
PostgreSQL and the receiver use the same cores, so only CPU per delivery applies to larger machines.
It shows how many engines one PostgreSQL supports.
"""

import asyncio
import os
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.drain import drained
from benchmarks.stack import (
    Stack,
    cpu_seconds,
    free_port,
    insert_webhooks,
    receiver_certificate,
    running_stack,
    wait_until_listening,
)

_NUMBERS = (1, 2, 4)
_ROUNDS = 3
_MERCHANTS = 50
_DELIVERIES_PER_SECOND = 2000
_IN_FLIGHT = 400
#: At this share of all cores the machine is full.
_SPENT = 0.9
_MICROSECONDS = 1_000_000

type Figures = dict[str, float]


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, int(seconds * _DELIVERIES_PER_SECOND)))


async def _measure(stack: Stack, count: int) -> dict[str, Any]:
    port = free_port()
    url = f"https://127.0.0.1:{port}/hook"
    await insert_webhooks(stack, url, [f"m_{n}" for n in range(_MERCHANTS)])
    rounds: dict[int, list[Figures]] = {number: [] for number in _NUMBERS}
    arguments = ("benchmarks.receiver", str(port), str(receiver_certificate(stack)))
    with stack.process(*arguments) as receiver:
        await wait_until_listening(port)
        for _ in range(_ROUNDS):
            for number, figures in rounds.items():
                before = cpu_seconds(receiver.pid)
                settings = {"WEBHOOK_MAX_IN_FLIGHT": str(_IN_FLIGHT // number)}
                drain = await drained(stack, count, _MERCHANTS, settings, processes=number)
                used = (cpu_seconds(receiver.pid) - before) / count * _MICROSECONDS
                figures.append(drain | {"receiver_cpu_us": used})
    result = {
        name: {number: round(_median(figures, name)) for number, figures in rounds.items()}
        for name in ("rate", "engine_cpu_us", "postgres_cpu_us", "receiver_cpu_us", "rss_mb")
    }
    busy = {number: round(_cores_busy(figures), 2) for number, figures in rounds.items()}
    return {
        **result,
        "speed_up": {
            number: round(result["rate"][number] / result["rate"][1], 2) for number in _NUMBERS
        },
        "cores_busy": busy,
        "cores": os.cpu_count(),
        "limit": {number: _limit(figures, busy[number]) for number, figures in rounds.items()},
        "engines_one_postgres_core_feeds": round(
            result["engine_cpu_us"][1] / result["postgres_cpu_us"][1], 1
        ),
        "deliveries": count,
    }


def _cores_busy(rounds: Sequence[Figures]) -> float:
    names = ("engine_cpu_us", "postgres_cpu_us", "receiver_cpu_us")
    return statistics.median(
        one["rate"] * sum(one[name] for name in names) / _MICROSECONDS for one in rounds
    )


def _limit(rounds: Sequence[Figures], busy: float) -> str:
    """Return the parts that were at their limit."""
    rate = _median(rounds, "rate")
    if busy > _SPENT * (os.cpu_count() or 1):
        return "the cores of this machine"
    if rate * _median(rounds, "receiver_cpu_us") > _SPENT * _MICROSECONDS:
        return "the receiver's core"
    if rate * _median(rounds, "engine_cpu_us") / rounds[0]["processes"] > _SPENT * _MICROSECONDS:
        return "the engines' cores"
    return "waiting: for PostgreSQL's disk, for the receiver, or for other work on this machine"


def _median(rounds: Sequence[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)
