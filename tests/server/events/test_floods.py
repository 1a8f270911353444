"""What one merchant floods us with, and what others notice of it while it is accepted."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from core.ids import new_id
from server.event_types.store import EventTypes
from server.events.ingest import Ingest
from server.events.publish_rates import FLOOD_EVENTS
from server.events.rules import EventDraft
from server.events.store import PublishedEvent
from server.metrics import ServerMetrics
from server.notify import Notifier
from tests.support.factories import EVENT_TYPE, promptly, until_blocked

KEYS = ("k1", "k2")


def draft(merchant_id: str, key: str = "", ordering_key: str = "") -> EventDraft:
    return EventDraft(
        merchant_id, EVENT_TYPE, "", b"{}", idempotency_key=key, ordering_key=ordering_key
    )


@pytest.fixture
def ingest(pool: Any) -> Ingest:
    metrics = ServerMetrics({})
    return Ingest(pool, EventTypes(pool), Notifier(pool), max_payload_bytes=1000, metrics=metrics)


async def hold_keys(connection: Any) -> None:
    """Whoever publishes for m_flood under one of KEYS waits until the transaction ends."""
    await connection.executemany(
        "INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)"
        " VALUES ('m_flood', $1, '', $2)",
        [(key, new_id()) for key in KEYS],
    )


async def begin(
    ingest: Ingest, pool: Any, calls: Sequence[Sequence[EventDraft]]
) -> list["asyncio.Task[Any]"]:
    """The first waits for a key; each other begins before whatever is called after this."""
    begun = []
    for drafts in calls:
        begun.append(asyncio.create_task(ingest.publish(drafts, "events[{}]")))
        await until_blocked(pool)
    return begun


@pytest.mark.parametrize("ordering_key", ["", "o"])
async def test_large_calls_are_not_in_the_way_of_others(
    ingest: Ingest, pool: Any, ordering_key: str
) -> None:
    async with pool.acquire() as connection:
        held = connection.transaction()
        await held.start()
        await hold_keys(connection)
        large = [
            [draft("m_flood", key, ordering_key), *[draft("m_flood", "", ordering_key)] * 50]
            for key in KEYS
        ]
        flood = await begin(ingest, pool, large)

        [accepted] = await promptly(ingest.publish([draft("m_1", "", ordering_key)], "event"))

        assert isinstance(accepted, PublishedEvent)
        assert not any(call.done() for call in flood)
        await held.rollback()
    assert [len(results) for results in await asyncio.gather(*flood)] == [51] * len(KEYS)


async def test_many_small_calls_of_one_merchant_are_not_in_the_way_of_others(
    ingest: Ingest, pool: Any
) -> None:
    for _ in range(FLOOD_EVENTS // 100):
        await ingest.publish([draft("m_flood")] * 100, "events[{}]")
    async with pool.acquire() as connection:
        held = connection.transaction()
        await held.start()
        await hold_keys(connection)
        flood = await begin(ingest, pool, [[draft("m_flood", key)] for key in KEYS])

        [accepted] = await promptly(ingest.publish([draft("m_1")], "event"))

        assert isinstance(accepted, PublishedEvent)
        await held.rollback()
    await asyncio.gather(*flood)
