"""Pages of ListDeliveries with a million finished deliveries, half of them of one merchant."""

import statistics
import time
from typing import Any

import asyncpg
import grpc

from benchmarks.stack import Stack
from postrider.v1 import delivery_pb2, delivery_service_pb2, delivery_service_pb2_grpc

DELIVERIES = 1_000_000
_MERCHANT = "m_0"
_PAGES = 20
_ROUNDS = 3

# Every second row is of m_0, one in a hundred failed, some have a rare type. The ids ascend as
# those of a day would.
_FILL = """
WITH configs AS (
    SELECT id, merchant_id, row_number() OVER (ORDER BY merchant_id) - 1 AS n FROM webhook_configs
), numbered AS (
    SELECT n, CASE WHEN n % 2 = 0 THEN 0 ELSE n / 2 % (SELECT count(*) FROM configs) END AS config
    FROM generate_series(1, $1::int) n
), filled AS (
    INSERT INTO finished_deliveries
        (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at)
    SELECT new_uuid7(), CASE WHEN d.n % 100 = 0 THEN 'failed' ELSE 'delivered' END, c.id,
        new_uuid7(), c.merchant_id,
        CASE WHEN d.n % 50 = 2 THEN 'refund.created' ELSE 'payment.succeeded' END, 1, now()
    FROM numbered d JOIN configs c ON c.n = d.config
    RETURNING id, state
)
INSERT INTO attempts
    (delivery_id, number, outcome, status_code, detail, started_at, duration_us)
SELECT id, 1, CASE state WHEN 'failed' THEN 'http_error' ELSE 'succeeded' END,
    CASE state WHEN 'failed' THEN 500 ELSE 200 END, '', now(), 1000
FROM filled
"""


async def history_figures(stack: Stack, port: int) -> dict[str, Any]:
    """Return the milliseconds per page, one call at a time. Replaces the content of the queue."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        await connection.execute("TRUNCATE delivery_queue")
        await connection.execute(_FILL, DELIVERIES, timeout=600)
        await connection.execute("VACUUM ANALYZE", timeout=600)
        webhook = await connection.fetchval(
            "SELECT id FROM webhook_configs WHERE merchant_id = $1", _MERCHANT
        )
    finally:
        await connection.close()
    filters: dict[str, dict[str, Any]] = {
        "none": {},
        "webhook": {"webhook_id": f"wh_{webhook.hex}"},
        "type": {"event_type": "refund.created"},
        "state": {"state": delivery_pb2.DELIVERY_STATE_FAILED},
        "all": {
            "webhook_id": f"wh_{webhook.hex}",
            "event_type": "payment.succeeded",
            "state": delivery_pb2.DELIVERY_STATE_FAILED,
        },
    }
    token = stack.token("webhooks:manage", merchant_id=_MERCHANT)
    times: dict[str, list[float]] = {name: [] for name in filters}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(_ROUNDS):
            for name, wanted in filters.items():
                times[name] += await _pages(channel, token, wanted)
    together = [each for measured in times.values() for each in measured]
    return {
        "p50_ms": round(statistics.median(together), 2),
        "p95_ms": _p95(together),
        "by_filter": {name: _p95(measured) for name, measured in times.items()},
        "deliveries": DELIVERIES,
    }


async def _pages(channel: grpc.aio.Channel, token: str, wanted: dict[str, Any]) -> list[float]:
    stub: Any = delivery_service_pb2_grpc.DeliveryServiceStub(channel)
    times, page_token = [], ""
    for _ in range(_PAGES):
        request = delivery_service_pb2.ListDeliveriesRequest(
            page_size=50, page_token=page_token, **wanted
        )
        began = time.perf_counter()
        response = await stub.ListDeliveries(
            request, metadata=(("authorization", f"Bearer {token}"),)
        )
        times.append((time.perf_counter() - began) * 1000)
        assert len(response.deliveries) == 50
        page_token = response.next_page_token
    return times


def _p95(times: list[float]) -> float:
    return round(statistics.quantiles(times, n=20)[-1], 2)
