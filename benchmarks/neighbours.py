"""`neighbours`: the effect of dead webhook configs, and of a burst for one, on healthy ones.

Rounds in turn: without disturbance, with a tenth of all configs dead, and with 100,000 events of
one merchant at once. Dead configs are of three kinds in equal parts: no response, a name that DNS
never answers, and refused connections. Each starts with more deliveries than its slots, which is
the worst case, and gets its share of the traffic. Healthy events are published at a steady rate for
the latency, and then as fast as they are received for the throughput, three times.

Every round starts with some healthy events, because a new engine first connects to every receiver.
The first second with the burst of the dead configs is a separate figure.
"""

import asyncio
import math
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.ledger import Receipt, percentile
from benchmarks.pipeline import Pipeline, running_server_and_receiver, with_engine
from benchmarks.stack import Stack, free_port, insert_webhooks, running_stack

_HEALTHY = 270
_DEAD = 30
_RATE = 200
_DEAD_BURST = 50
_ROUNDS = 3
#: Time to start the publishing processes.
_LAUNCH_SECONDS = 4.0
#: More than each healthy config needs for its first delivery.
_WARM_SECONDS = 2.0
#: Time in which the burst of the dead configs is drained.
_ONSET_SECONDS = 1.0
#: Several, because the speed of the machine changes within seconds.
_FAST_TIMES = 3
_FLOOD_ROUNDS = 2
_FLOOD_PER_SECOND = 20_000
_FLOODED = 1000
_ENGINE = "benchmarks.engine_without_dns"

_CLEAR = "TRUNCATE delivery_queue, events, attempts, finished_deliveries"
_HEAL = """
UPDATE webhook_configs
SET active = true, deactivation_reason = NULL, consecutive_failures = 0, breaker_open_until = NULL,
    breaker_trips = 0, version = version + 1
"""
_QUICK_FAILURES = """
SELECT count(*) FROM attempts WHERE outcome IN ('dns_error', 'refused') AND duration_us < 1000000
"""
_DEAD_LEASED = "SELECT count(*) FROM delivery_queue WHERE state = 'leased' AND merchant_id ~ '^d_'"

type Figures = dict[str, float]


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack, _silent_port() as silent:
        return asyncio.run(_measure(stack, silent, seconds))


async def _measure(stack: Stack, silent: int, seconds: float) -> dict[str, Any]:
    calm, dead, flood = [], [], []
    async with running_server_and_receiver(stack) as pipeline:
        await _register(stack, pipeline.receiver_port, silent)
        for number in range(_ROUNDS):
            calm.append(await _round(pipeline, seconds, dead=False))
            dead.append(await _round(pipeline, seconds, dead=True))
            if number < _FLOOD_ROUNDS:
                flood.append(await _flooded(pipeline, seconds))
    return {
        "healthy_p99_ratio": _ratio(dead, calm, "p99_ms"),
        "healthy_throughput_ratio": _ratio(dead, calm, "rate"),
        "flood_p99_ratio": _ratio(flood, calm, "p99_ms"),
        "healthy_onset_p99_ratio": _ratio(dead, calm, "onset_p99_ms"),
        "p50_ms": round(_median(calm, "p50_ms"), 1),
        "p99_ms": round(_median(calm, "p99_ms"), 1),
        "rate": round(_median(calm, "rate")),
        "dead_p50_ms": round(_median(dead, "p50_ms"), 1),
        "dead_p99_ms": round(_median(dead, "p99_ms"), 1),
        "onset_p99_ms": round(_median(calm, "onset_p99_ms"), 1),
        "dead_onset_p99_ms": round(_median(dead, "onset_p99_ms"), 1),
        "dead_rate": round(_median(dead, "rate")),
        "dead_in_flight": round(_median(dead, "dead_in_flight")),
        "flood_p50_ms": round(_median(flood, "p50_ms"), 1),
        "flood_p99_ms": round(_median(flood, "p99_ms"), 1),
        "flood_publishing_p99_ms": round(_median(flood, "publishing_p99_ms"), 1),
        "flood_events": round(_median(flood, "events")),
        "p99_ms_by_round": [
            [round(one["p99_ms"], 1) for one in rounds] for rounds in (calm, dead, flood)
        ],
        "healthy_configs": _HEALTHY,
        "dead_configs": _DEAD,
        "events_per_s": _RATE,
    }


async def _register(stack: Stack, receiver: int, silent: int) -> None:
    await insert_webhooks(
        stack, f"https://127.0.0.1:{receiver}/" + "{}", [f"m_{n}" for n in range(_HEALTHY)]
    )
    # Not a reserved name, because the engine would not look it up.
    kinds = (f"127.0.0.1:{silent}", "{}.example.com", f"127.0.0.1:{free_port()}")
    for kind, host in enumerate(kinds):
        merchants = [f"d_{n}" for n in range(kind, _DEAD, len(kinds))]
        await insert_webhooks(stack, f"https://{host}/hook", merchants)
    await insert_webhooks(stack, f"https://127.0.0.1:{receiver}/{_FLOODED}", ["f_0"])


@contextmanager
def _silent_port() -> Iterator[int]:
    """Accept connections in the kernel, and never respond."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        yield listener.getsockname()[1]


async def _round(pipeline: Pipeline, seconds: float, *, dead: bool) -> Figures:
    healthy = {"merchants": "m_", "merchant_count": _HEALTHY}
    async with with_engine(pipeline, _ENGINE, kill=True) as running, asyncio.TaskGroup() as group:
        begins = time.time() + _LAUNCH_SECONDS
        onset = begins + _WARM_SECONDS
        measured = onset + _ONSET_SECONDS
        if dead:
            burst, rate = _DEAD * _DEAD_BURST, _RATE * _DEAD / _HEALTHY
            for orders in ({"events": burst}, {"rate": rate, "seconds": 5 * seconds}):
                group.create_task(_publish_to_dead(running, starts_at=onset, **orders))
        receipts, _ = await running.deliver(
            **healthy,
            batch=1,
            rate=_RATE,
            starts_at=begins,
            seconds=measured + 2 * seconds - begins,
        )
        in_flight = await running.connection.fetchval(_DEAD_LEASED)
        rates = [await _rate(running, **healthy, seconds=seconds / 2) for _ in range(_FAST_TIMES)]
    if quick := await pipeline.connection.fetchval(_QUICK_FAILURES):
        raise RuntimeError(f"{quick} look-ups failed at once, which were to get no answer")
    await _clear(pipeline)
    return {
        **_latency(_between(measured, math.inf, receipts)),
        "onset_p99_ms": _latency(_between(onset, measured, receipts))["p99_ms"],
        "rate": statistics.median(rates),
        "dead_in_flight": in_flight,
    }


async def _rate(pipeline: Pipeline, **orders: Any) -> float:
    """Return healthy events per second, as fast as they are received."""
    receipts, _ = await pipeline.deliver(**orders, batch=100)
    return len(receipts) / (receipts[-1].received_at - receipts[0].sent_at)


async def _publish_to_dead(pipeline: Pipeline, **orders: Any) -> None:
    await pipeline.publish(merchants="d_", merchant_count=_DEAD, batch=10, window=10**9, **orders)


async def _flooded(pipeline: Pipeline, seconds: float) -> Figures:
    events = min(int(seconds * _FLOOD_PER_SECOND), 100_000)
    async with with_engine(pipeline, _ENGINE, kill=True) as running, asyncio.TaskGroup() as group:
        begins = time.time() + _LAUNCH_SECONDS
        measured = begins + _WARM_SECONDS
        flood = group.create_task(
            running.publish(
                merchants="f_",
                merchant_count=1,
                batch=100,
                window=10**9,
                events=events,
                starts_at=measured,
            )
        )
        start = len(running.ledger)
        published = await running.publish(
            merchants="m_",
            merchant_count=_HEALTHY,
            batch=1,
            rate=_RATE,
            starts_at=begins,
            seconds=_WARM_SECONDS + 3 * seconds,
        )
        receipts = await _healthy(running, start, int(published["accepted"]))
        flooded = await flood
    await _clear(pipeline)
    publishing = _between(measured, measured + flooded["seconds"], receipts)
    return {
        **_latency(_between(measured, math.inf, receipts)),
        "publishing_p99_ms": _latency(publishing)["p99_ms"],
        "events": flooded["accepted"],
    }


def _between(begins: float, ends: float, receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return the latencies of the events that were published in this time."""
    return [receipt for receipt in receipts if begins <= receipt.sent_at < ends]


async def _healthy(pipeline: Pipeline, start: int, count: int) -> list[Receipt]:
    """Wait for this many receipts of the other configs, and return them."""
    receipts: list[Receipt] = []
    async with asyncio.timeout(120):
        while len(receipts) < count:
            await asyncio.sleep(0.1)
            new = pipeline.ledger.since(start)
            start += len(new)
            receipts += [receipt for receipt in new if receipt.webhook != _FLOODED]
    return receipts


async def _clear(pipeline: Pipeline) -> None:
    await pipeline.connection.execute(_CLEAR)
    await pipeline.connection.execute(_HEAL)


def _latency(receipts: Sequence[Receipt]) -> Figures:
    values = [receipt.latency_ms for receipt in receipts]
    return {"p50_ms": percentile(values, 0.5), "p99_ms": percentile(values, 0.99)}


def _median(rounds: Sequence[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def _ratio(rounds: Sequence[Figures], base: Sequence[Figures], name: str) -> float:
    return round(_median(rounds, name) / _median(base, name), 3)
