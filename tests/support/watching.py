"""Open a WatchDeliveries stream, and record attempts for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from core.ids import format_id
from core.queue import LeasedDelivery
from postrider.v1 import delivery_service_pb2 as pb
from tests.support.factories import (
    lease_one,
    settle,
    settlement,
)
from tests.support.platform import Platform

#: A response excerpt so large that a few hundred attempts fill the connection's buffers.
BIG_EXCERPT = "x" * 1000


class Watching:
    """An open watch. Its first keep-alive was read, so later attempts are sent."""

    def __init__(self, call: Any):
        self.call = call
        self.token = ""

    async def read(self) -> pb.WatchDeliveriesResponse:
        async with asyncio.timeout(20):
            answer: pb.WatchDeliveriesResponse = await self.call.read()
        self.token = answer.resume_token
        return answer

    async def news(self, count: int) -> list[tuple[str, int]]:
        """The delivery id and number of the next attempts."""
        found: list[tuple[str, int]] = []
        while len(found) < count:
            answer = await self.read()
            if answer.HasField("delivery"):
                [attempt] = answer.delivery.attempts
                found.append((answer.delivery.id, attempt.number))
        return found


@asynccontextmanager
async def watching(
    platform: Platform, merchant_id: str = "m_1", **request: Any
) -> AsyncIterator[Watching]:
    call = platform.as_merchant(merchant_id).WatchDeliveries(**request)
    watch = Watching(call)
    first = await watch.read()
    assert not first.HasField("delivery")
    try:
        yield watch
    finally:
        call.cancel()


def named(*deliveries: LeasedDelivery, number: int = 1) -> list[tuple[str, int]]:
    return [(format_id("dlv", delivery.id), number) for delivery in deliveries]


async def record(pool: Any, webhook_id: UUID, **overrides: Any) -> LeasedDelivery:
    """A delivery whose one attempt is recorded now."""
    delivery = await lease_one(pool, webhook_id, **overrides)
    await settle(pool, settlement(delivery))
    return delivery


async def record_many(pool: Any, webhook_id: UUID, count: int) -> None:
    """Record this many finished deliveries with one attempt each, in one transaction."""
    await pool.execute(
        """
        WITH finished AS (
            INSERT INTO finished_deliveries
                (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count,
                created_at)
            SELECT new_uuid7(), 'delivered', $1, new_uuid7(), 'm_1', 'payment.succeeded', 1, now()
            FROM generate_series(1, $2::int) RETURNING id
        )
        INSERT INTO attempts
            (delivery_id, number, outcome, detail, started_at, duration_us, response_excerpt)
        SELECT id, 1, 'succeeded', '200 OK', now(), 1, $3 FROM finished
        """,
        webhook_id,
        count,
        BIG_EXCERPT,
    )
