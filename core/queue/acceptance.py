"""How deliveries come into being: with their event, or by a redelivery; and the hint of it."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from core.queue.records import Connection, NewEvent

#: Channel of the hint that something became due. A hint only: engines poll as well.
CHANNEL = "postrider_due"


# One statement per batch, whatever its size: keys, events, and a delivery per matching config.
_ENQUEUE = """
WITH input AS (
    SELECT * FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::bytea[],
        $8::timestamptz[]
    ) WITH ORDINALITY AS t(id, merchant_id, type, content_type, payload, idempotency_key,
        content_hash, not_before, position)
), new_keys AS (
    INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)
    SELECT merchant_id, idempotency_key, content_hash, id FROM input
    WHERE idempotency_key IS NOT NULL
    -- Two batches that share keys take them in one order, so neither waits for the other for ever.
    ORDER BY merchant_id, idempotency_key, position
    ON CONFLICT DO NOTHING
    RETURNING event_id
), accepted AS (
    SELECT id, merchant_id, type, content_type, payload, not_before FROM input
    WHERE idempotency_key IS NULL OR id IN (SELECT event_id FROM new_keys)
), filters AS (
    -- What may stand for a type in a config's events: its name, or a part of it and a star.
    SELECT type, type || ARRAY(
        SELECT array_to_string(parts[:n], '.') || '.*'
        FROM generate_series(1, cardinality(parts) - 1) n
    ) AS names
    FROM (SELECT DISTINCT type, string_to_array(type, '.') AS parts FROM accepted) t
), matched AS (
    SELECT a.id AS event_id, a.merchant_id, a.type, a.not_before, c.id AS webhook_id, c.active
    FROM accepted a
    JOIN filters f ON f.type = a.type
    JOIN webhook_configs c
        ON c.merchant_id = a.merchant_id AND c.deleted_at IS NULL AND c.events && f.names
), queued AS (
    INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at)
    SELECT new_uuid7(), webhook_id, event_id, merchant_id, type,
        CASE WHEN active THEN 'ready' ELSE 'parked' END, greatest(now(), not_before)
    FROM matched
), counts AS (
    SELECT event_id, count(*) AS deliveries FROM matched GROUP BY event_id
)
INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count, not_before)
SELECT a.id, a.merchant_id, a.type, a.content_type, a.payload, coalesce(n.deliveries, 0),
    a.not_before
FROM accepted a LEFT JOIN counts n ON n.event_id = a.id
RETURNING id, delivery_count, created_at
"""


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
    rows = await connection.fetch(
        _ENQUEUE,
        [e.id for e in events],
        [e.merchant_id for e in events],
        [e.type for e in events],
        [e.content_type for e in events],
        [e.payload for e in events],
        [e.idempotency_key for e in events],
        [e.content_hash for e in events],
        [e.not_before for e in events],
    )
    return {row["id"]: (row["delivery_count"], row["created_at"]) for row in rows}


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
