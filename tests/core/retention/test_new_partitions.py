"""Rows on their way to a default partition while their daily partition is created."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from core.retention import partitions
from delivery.metrics import EngineMetrics
from delivery.record import Recorder
from delivery.settings import DeliverySettings
from server.event_types.store import EventTypes
from server.events.ingest import Ingest
from server.events.rules import EventDraft
from server.events.store import PublishedEvent
from server.metrics import ServerMetrics
from server.notify import Notifier
from tests.support.factories import (
    EVENT_TYPE,
    lease_one,
    make_webhook_config,
    promptly,
    settlement,
    until_blocked,
)


@asynccontextmanager
async def creating_today(pool: Any) -> AsyncIterator[None]:
    """Create today's partitions and commit at the end of the context."""
    async with pool.acquire() as connection, connection.transaction():
        assert await partitions.create_day(connection, await partitions.today(connection))
        yield


async def test_event_is_accepted_during_creation(pool: Any) -> None:
    ingest = Ingest(pool, EventTypes(pool), Notifier(pool), 1000, ServerMetrics({}))
    draft = EventDraft("m_1", EVENT_TYPE, "", b"{}", idempotency_key="")

    async with creating_today(pool):
        publishing = asyncio.create_task(ingest.publish([draft], "event"))
        await until_blocked(pool)
    [accepted] = await promptly(publishing)

    assert isinstance(accepted, PublishedEvent)
    assert await pool.fetchval("SELECT count(*) FROM events_default") == 0
    assert await pool.fetchval("SELECT count(*) FROM events") == 1


async def test_result_is_recorded_once_during_creation(pool: Any) -> None:
    delivery = await lease_one(pool, await make_webhook_config(pool))
    # A day is not created while the default partition has rows of it.
    await pool.execute("DELETE FROM events")
    settled: list[int] = []
    recorder = Recorder(
        pool,
        DeliverySettings(),
        EngineMetrics(),
        lambda _batch, done: settled.append(len(done.delivery_ids)),
    )
    recorder.put(settlement(delivery))

    async with creating_today(pool):
        flushing = asyncio.create_task(recorder.flush())
        await until_blocked(pool)
    await promptly(flushing)

    assert settled == [1]
    for table in ("finished_deliveries", "attempts"):
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1  # noqa: S608
        assert await pool.fetchval(f"SELECT count(*) FROM {table}_default") == 0  # noqa: S608
