"""`endtoend`: from publish to receipt, with separate processes for server, engine and receiver.

Each round has batches of 100 and unary calls, with a bare POST loop before and after the batches.
CPU is compared within a round, because the speed of a machine changes between rounds. A publisher
without a rate has a fixed number of events in flight, so its rate is that of the whole path.
Latency is from the publisher's clock, in the payload, to the receiver's, on the same machine.
"""

import asyncio
import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.ledger import percentile
from benchmarks.pipeline import Pipeline, running_server_and_receiver, with_engine
from benchmarks.stack import Stack, insert_webhooks, running_stack
from benchmarks.statements import counted

MERCHANTS = 50
_BATCH = 100
_ROUNDS = 5
_LOW_RATE = 100
_BARE_PER_SECOND = 2000
# Few, because it opens its connections in every round, and the engine keeps its own.
_BARE_CONCURRENCY = 50
_LEAD_IN = 500
_WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"

type Figures = dict[str, float]


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, seconds))


async def _measure(stack: Stack, seconds: float) -> dict[str, Any]:
    async with running_server_and_receiver(stack) as idle:
        base = f"https://127.0.0.1:{idle.receiver_port}"
        await insert_webhooks(stack, base + "/{}", [f"m_{n}" for n in range(MERCHANTS)])
        async with with_engine(idle) as pipeline:
            await _sustain(pipeline, _BATCH, seconds=60, events=_LEAD_IN)
            low = await latencies(pipeline, _LOW_RATE, 2 * seconds)
            bare, batch, unary = [], [], []
            posts = int(seconds * _BARE_PER_SECOND / 2)
            for _ in range(_ROUNDS):
                before = await _bare(stack, f"{base}/bare", posts)
                batch.append(await _sustain(pipeline, _BATCH, seconds))
                after = await _bare(stack, f"{base}/bare", posts)
                bare.append({name: (before[name] + after[name]) / 2 for name in before})
                unary.append(await _sustain(pipeline, 1, seconds))
            rate = _median(batch, "rate")
            unary_rate = _median(unary, "rate")
            busy = await latencies(pipeline, 0.7 * unary_rate, seconds)
            by_batch, by_unary = [await _statements(pipeline, n, seconds / 2) for n in (_BATCH, 1)]
    spent = [
        sum(one[f"{name}_cpu_us"] for name in ("server", "engine", "postgres")) for one in batch
    ]
    ratios = [ours / loop["cpu_us"] for ours, loop in zip(spent, bare, strict=True)]
    return {
        "rate": round(rate),
        "unary_rate": round(unary_rate),
        "cpu_us_per_webhook": round(statistics.median(spent)),
        "bare_cpu_us": round(_median(bare, "cpu_us")),
        "cpu_ratio": round(statistics.median(ratios), 2),
        "cpu_ratios": [round(ratio, 2) for ratio in ratios],
        "bare_rate": round(_median(bare, "rate")),
        "statements_per_webhook": round(by_batch, 3),
        "unary_statements_per_webhook": round(by_unary, 3),
        **tails("", low),
        **tails("load70_", busy),
        "load70_rate": round(0.7 * unary_rate),
        "cpu_us": {"batch": _cpu(batch), "unary": _cpu(unary)},
        "wal_bytes_per_webhook": round(_median(batch, "wal_bytes")),
        "rates": [round(one["rate"]) for one in batch],
        "cores_busy": round(_median(batch, "cores_busy"), 2),
    }


async def latencies(pipeline: Pipeline, rate: float, seconds: float) -> Sequence[float]:
    """Return the milliseconds from publish to receipt of single events at this rate."""
    receipts, _ = await pipeline.deliver(
        merchants="m_", merchant_count=MERCHANTS, batch=1, rate=rate, seconds=seconds
    )
    return [receipt.latency_ms for receipt in receipts]


def tails(prefix: str, values: Sequence[float]) -> Figures:
    return {
        f"{prefix}p50_ms": round(percentile(values, 0.5), 1),
        f"{prefix}p99_ms": round(percentile(values, 0.99), 1),
        f"{prefix}p999_ms": round(percentile(values, 0.999), 1),
    }


async def _sustain(pipeline: Pipeline, batch: int, seconds: float, events: int = 10**9) -> Figures:
    """Return rate and microseconds of CPU per webhook of each process, at the limit."""
    await pipeline.settled()
    before = pipeline.cpu()
    wal = await pipeline.connection.fetchval(_WAL)
    receipts, publisher_cpu = await pipeline.deliver(
        merchants="m_", merchant_count=MERCHANTS, batch=batch, seconds=seconds, events=events
    )
    await pipeline.settled()
    used = {name: value - before[name] for name, value in pipeline.cpu().items()}
    used["publisher"] = publisher_cpu
    wal = await pipeline.connection.fetchval(_WAL) - wal
    count = len(receipts)
    elapsed = receipts[-1].received_at - min(receipt.sent_at for receipt in receipts)
    return {
        "rate": count / elapsed,
        "cores_busy": sum(used.values()) / elapsed,
        "wal_bytes": float(wal) / count,
        **{f"{name}_cpu_us": value / count * 1e6 for name, value in used.items()},
    }


async def _statements(pipeline: Pipeline, batch: int, seconds: float) -> float:
    async with counted(pipeline.stack) as statements:
        start = len(pipeline.ledger)
        await _sustain(pipeline, batch, seconds)
        return statements.of_ours() / (len(pipeline.ledger) - start)


async def _bare(stack: Stack, url: str, count: int) -> Figures:
    arguments = ("benchmarks.bare_post", url, str(stack.ca_file), str(count))
    with stack.process(*arguments, str(_BARE_CONCURRENCY)) as process:
        figures: Figures = json.loads(await stack.output(process))
    return figures


def _median(rounds: Sequence[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def _cpu(rounds: Sequence[Figures]) -> dict[str, int]:
    names = ("server", "engine", "postgres", "receiver", "publisher")
    return {name: round(_median(rounds, f"{name}_cpu_us")) for name in names}
