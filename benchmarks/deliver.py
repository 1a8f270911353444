"""`deliver`: one engine process on a prefilled queue, beside a bare aiohttp POST loop.

Both send the same payload to the same receiver over TLS with the same concurrency, bare loop before
and after, so that a machine that gets faster or slower meanwhile shows in their difference.
"""

import asyncio
import json
import signal
import socket
import statistics
from typing import Any

import asyncpg

from benchmarks.payload import PAYLOAD
from benchmarks.stack import (
    Stack,
    cpu_seconds,
    cpu_seconds_of_postgres,
    insert_webhooks,
    rss_megabytes,
    running_stack,
    wait_until_listening,
)

_WEBHOOKS = 50
_IN_FLIGHT_PER_WEBHOOK = 4
_DELIVERIES_PER_SECOND = 2000

_PREFILL = """
WITH numbered AS (
    SELECT n, new_uuid7() AS event_id, 'm_' || n % $2 AS merchant_id
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


def measure(seconds: float) -> dict[str, Any]:
    with running_stack() as stack:
        return asyncio.run(_measure(stack, int(seconds * _DELIVERIES_PER_SECOND)))


async def _measure(stack: Stack, count: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    certificate = stack.directory / "receiver.pem"
    certificate.write_bytes(
        stack.authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes()
    )
    url = f"https://127.0.0.1:{port}/hook"
    await insert_webhooks(stack, url, [f"m_{n}" for n in range(_WEBHOOKS)])
    concurrency = _WEBHOOKS * _IN_FLIGHT_PER_WEBHOOK
    with stack.process("benchmarks.receiver", str(port), str(certificate)):
        await wait_until_listening(port)
        bare = [await _bare(stack, url, count, concurrency)]
        ours = await _engine(stack, count)
        bare.append(await _bare(stack, url, count, concurrency))
    bare_rate = statistics.mean(result["rate"] for result in bare)
    return {
        "ratio": round(ours["rate"] / bare_rate, 3),
        "rate": round(ours["rate"]),
        "bare_rate": round(bare_rate),
        "engine_cpu_us": round(ours["engine_cpu_us"]),
        "postgres_cpu_us": round(ours["postgres_cpu_us"]),
        "bare_cpu_us": round(statistics.mean(result["cpu_us"] for result in bare)),
        "rss_mb": round(ours["rss_mb"]),
        "deliveries": count,
        "concurrency": concurrency,
    }


async def _bare(stack: Stack, url: str, count: int, concurrency: int) -> dict[str, float]:
    arguments = ("benchmarks.bare_post", url, str(stack.ca_file), str(count), str(concurrency))
    with stack.process(*arguments) as process:
        assert process.stdout
        line = await asyncio.to_thread(process.stdout.readline)
    figures: dict[str, float] = json.loads(line)
    return figures


async def _engine(stack: Stack, count: int) -> dict[str, float]:
    postmaster = stack.postgres.process.pid
    connection = await asyncpg.connect(stack.database_url)
    settings = {
        "WEBHOOK_MAX_IN_FLIGHT": str(_WEBHOOKS * _IN_FLIGHT_PER_WEBHOOK),
        "WEBHOOK_MAX_IN_FLIGHT_PER_WEBHOOK": "32",
    }
    try:
        with stack.process("delivery", **settings) as process:
            while not await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name = 'postrider-delivery' AND query LIKE 'LISTEN%'"
            ):
                await asyncio.sleep(0.05)
            # Stopped while the queue fills, so that it meets all of it at once.
            process.send_signal(signal.SIGSTOP)
            await connection.execute(_PREFILL, count, _WEBHOOKS, PAYLOAD, timeout=300)
            await connection.execute("VACUUM ANALYZE delivery_queue")
            before = cpu_seconds(process.pid), cpu_seconds_of_postgres(postmaster)
            began = asyncio.get_running_loop().time()
            process.send_signal(signal.SIGCONT)
            while await connection.fetchval("SELECT EXISTS (SELECT 1 FROM delivery_queue)"):
                await asyncio.sleep(0.05)
            seconds = asyncio.get_running_loop().time() - began
            after = cpu_seconds(process.pid), cpu_seconds_of_postgres(postmaster)
            rss = rss_megabytes(process.pid)
    finally:
        await connection.close()
    return {
        "rate": count / seconds,
        "engine_cpu_us": (after[0] - before[0]) / count * 1e6,
        "postgres_cpu_us": (after[1] - before[1]) / count * 1e6,
        "rss_mb": rss,
    }
