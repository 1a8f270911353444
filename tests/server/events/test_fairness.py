"""A merchant that publishes a burst does not delay the calls of other merchants."""

import asyncio
from collections.abc import AsyncIterator, Sequence
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


@pytest.fixture
async def held_keys(pool: Any) -> AsyncIterator[Any]:
    """The transaction that holds KEYS of m_burst: events with these keys wait for its end."""
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.executemany(
            "INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)"
            " VALUES ('m_burst', $1, '', $2)",
            [(key, new_id()) for key in KEYS],
        )
        yield transaction


async def begin(
    ingest: Ingest, pool: Any, calls: Sequence[Sequence[EventDraft]]
) -> list["asyncio.Task[Any]"]:
    """Start the calls. Returns when at least one of them waits for a key."""
    begun = []
    for drafts in calls:
        begun.append(asyncio.create_task(ingest.publish(drafts, "events[{}]")))
        await until_blocked(pool)
    return begun


@pytest.mark.parametrize("ordering_key", ["", "o"])
async def test_large_calls_do_not_delay_other_merchants(
    ingest: Ingest, pool: Any, held_keys: Any, ordering_key: str
) -> None:
    large = [
        [draft("m_burst", key, ordering_key), *[draft("m_burst", "", ordering_key)] * 50]
        for key in KEYS
    ]
    burst = await begin(ingest, pool, large)

    [accepted] = await promptly(ingest.publish([draft("m_1", "", ordering_key)], "event"))

    assert isinstance(accepted, PublishedEvent)
    assert not any(call.done() for call in burst)
    await held_keys.rollback()
    assert [len(results) for results in await asyncio.gather(*burst)] == [51] * len(KEYS)


async def test_many_small_calls_do_not_delay_other_merchants(
    ingest: Ingest, pool: Any, held_keys: Any
) -> None:
    for _ in range(FLOOD_EVENTS // 100):
        await ingest.publish([draft("m_burst")] * 100, "events[{}]")
    burst = await begin(ingest, pool, [[draft("m_burst", key)] for key in KEYS])

    [accepted] = await promptly(ingest.publish([draft("m_1")], "event"))

    assert isinstance(accepted, PublishedEvent)
    await held_keys.rollback()
    await asyncio.gather(*burst)
