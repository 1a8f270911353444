"""How deliveries come into being: with their event, or by a redelivery; and the hint of it."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from core.db import RETRYABLE_ERRORS, Pool
from core.queue.order import lock_keys, promote
from core.queue.records import Chain, Connection, NewEvent

#: Channel of the hint that something became due. A hint only: engines poll as well.
CHANNEL = "postrider_due"


# One statement per batch, whatever its size: keys, events, and a delivery per matching config.
_ACCEPT = """
WITH input AS (
    SELECT * FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::bytea[],
        $8::timestamptz[], $9::text[]
    ) WITH ORDINALITY AS t(id, merchant_id, type, content_type, payload, idempotency_key,
        content_hash, not_before, ordering_key, position)
), new_keys AS (
    INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)
    SELECT merchant_id, idempotency_key, content_hash, id FROM input
    WHERE idempotency_key IS NOT NULL
    -- Two batches that share keys take them in one order, so neither waits for the other for ever.
    ORDER BY merchant_id, idempotency_key, position
    ON CONFLICT DO NOTHING
    RETURNING event_id
), accepted AS (
    SELECT id, merchant_id, type, content_type, payload, not_before, ordering_key, position
    FROM input
    WHERE idempotency_key IS NULL OR id IN (SELECT event_id FROM new_keys)
), filters AS (
    -- What may stand for a type in a config's events: its name, or a part of it and a star.
    SELECT type, type || ARRAY(
        SELECT array_to_string(parts[:n], '.') || '.*'
        FROM generate_series(1, cardinality(parts) - 1) n
    ) AS names
    FROM (SELECT DISTINCT type, string_to_array(type, '.') AS parts FROM accepted) t
), matched AS (
    SELECT a.id AS event_id, a.merchant_id, a.type, a.not_before, c.id AS webhook_id, c.active,
        CASE WHEN c.ordered THEN a.ordering_key END AS ordering_key, a.position
    FROM accepted a
    JOIN filters f ON f.type = a.type
    JOIN webhook_configs c
        ON c.merchant_id = a.merchant_id AND c.deleted_at IS NULL AND c.events && f.names
), {queued}, counts AS (
    SELECT event_id, count(*) AS deliveries FROM matched GROUP BY event_id
)
INSERT INTO events
    (id, merchant_id, type, content_type, payload, delivery_count, not_before, ordering_key)
SELECT a.id, a.merchant_id, a.type, a.content_type, a.payload, coalesce(n.deliveries, 0),
    a.not_before, a.ordering_key
FROM accepted a LEFT JOIN counts n ON n.event_id = a.id
RETURNING id, delivery_count, created_at{also}
"""

_ENQUEUE = _ACCEPT.format(
    queued="""queued AS (
    INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at)
    SELECT new_uuid7(), webhook_id, event_id, merchant_id, type,
        CASE WHEN active THEN 'ready' ELSE 'parked' END, greatest(now(), not_before)
    FROM matched
)""",
    also="",
)

# Behind what its chain holds already; the first of a chain is queued as it would be without one.
_ENQUEUE_IN_ORDER = _ACCEPT.format(
    queued="""placed AS (
    SELECT m.*, CASE WHEN ordering_key IS NOT NULL THEN coalesce(b.last, f.position, 0)
        + row_number() OVER (PARTITION BY webhook_id, ordering_key ORDER BY m.position)
        END AS ordering_position
    FROM matched m
    LEFT JOIN LATERAL (
        SELECT q.ordering_position AS last FROM delivery_queue q
        WHERE q.webhook_id = m.webhook_id AND q.ordering_key = m.ordering_key
            AND q.state = 'blocked'
        ORDER BY q.ordering_position DESC LIMIT 1
    ) b ON true
    LEFT JOIN LATERAL (
        SELECT q.ordering_position AS position FROM delivery_queue q
        WHERE q.webhook_id = m.webhook_id AND q.ordering_key = m.ordering_key
            AND q.state <> 'blocked'
    ) f ON true
), queued AS (
    INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at,
        ordering_key, ordering_position)
    SELECT new_uuid7(), webhook_id, event_id, merchant_id, type,
        CASE WHEN ordering_position > 1 THEN 'blocked' WHEN active THEN 'ready' ELSE 'parked' END,
        CASE WHEN ordering_position > 1 THEN 'infinity' ELSE greatest(now(), not_before) END,
        ordering_key, ordering_position
    FROM placed
    RETURNING event_id, webhook_id, state
)""",
    also=""", ARRAY(
    SELECT q.webhook_id FROM queued q WHERE q.event_id = events.id AND q.state = 'blocked'
) AS blocked_for""",
)


# Joined with its event, since a delivery without one could be claimed and never sent.
_REDELIVER = """
INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, redelivery_of)
SELECT new_uuid7(), f.webhook_id, f.event_id, f.merchant_id, f.event_type,
    CASE WHEN c.active THEN 'ready' ELSE 'parked' END, f.id
FROM finished_deliveries f
JOIN webhook_configs c ON c.id = f.webhook_id AND c.deleted_at IS NULL
JOIN events e ON e.id = f.event_id
WHERE f.id = $2 AND f.merchant_id = $1
RETURNING id
"""


async def enqueue(
    connection: Connection, events: Sequence[NewEvent]
) -> dict[UUID, tuple[int, datetime]]:
    """Accept events: store them, a delivery per matching config, and their place in the queue.

    Returns delivery count and time by event id, for those accepted; an event missing from it met
    an idempotency key that was there before (or earlier in `events`).
    """
    rows = await connection.fetch(_ENQUEUE, *_columns(events))
    return {row["id"]: (row["delivery_count"], row["created_at"]) for row in rows}


async def enqueue_in_order(
    pool: Pool, events: Sequence[NewEvent]
) -> dict[UUID, tuple[int, datetime]]:
    """As enqueue(), in a transaction of its own, for events of which some have an ordering key.

    Events of one key are accepted in the order of their commits, and in a batch in its order.
    """
    # Each statement has to see what was committed before it, whatever the database's default is.
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="read_committed"),
    ):
        await lock_keys(connection, events)
        rows = await connection.fetch(_ENQUEUE_IN_ORDER, *_columns(events))
    keys = {e.id: e.ordering_key for e in events}
    blocked = {Chain(w, keys[row["id"]] or "") for row in rows for w in row["blocked_for"]}
    if blocked:
        # Their first may have ended meanwhile. Accepted they are in any case.
        with suppress(*RETRYABLE_ERRORS):
            await promote(pool, list(blocked))
    return {row["id"]: (row["delivery_count"], row["created_at"]) for row in rows}


def _columns(events: Sequence[NewEvent]) -> list[list[Any]]:
    return [
        [e.id for e in events],
        [e.merchant_id for e in events],
        [e.type for e in events],
        [e.content_type for e in events],
        [e.payload for e in events],
        [e.idempotency_key for e in events],
        [e.content_hash for e in events],
        [e.not_before for e in events],
        [e.ordering_key for e in events],
    ]


async def redeliver(connection: Connection, merchant_id: str, delivery_id: UUID) -> UUID | None:
    """Make a new delivery of a finished one's event, with a retry schedule of its own.

    None, and nothing made, when the merchant has no such finished delivery, its config is deleted
    or its event is no longer stored.
    """
    made: UUID | None = await connection.fetchval(_REDELIVER, merchant_id, delivery_id)
    return made


async def hint(connection: Connection) -> None:
    """Tell listening engines to look; outside the transaction that enqueued."""
    await connection.execute(f"NOTIFY {CHANNEL}")
