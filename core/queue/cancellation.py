"""The end of a deleted config's open deliveries."""

from uuid import UUID

from core.db import Pool
from core.lookup import equal
from core.queue.records import Connection

#: Deliveries of one statement: tens of milliseconds, so that nobody waits long for what it locks.
_CHUNK = 1000

# Passes by what another statement holds at this moment: to wait for a settle, which may itself be
# waiting for the config our caller has locked, would be a deadlock. The next claim cancels those.
_CANCEL_WEBHOOK = f"""
WITH parked AS (
    -- Apart, since each has an index of its own.
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state = 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), others AS (
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state <> 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), free AS (
    -- Those that are not parked first: a claim may have them.
    SELECT id FROM others UNION ALL SELECT id FROM parked LIMIT $2
), cancelled AS (
    DELETE FROM delivery_queue q USING free WHERE {equal("q.id", "free.id")} RETURNING q.*
)
INSERT INTO finished_deliveries
    (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of)
SELECT id, 'cancelled', webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of
FROM cancelled
"""  # noqa: S608 - of constants


async def cancel_webhook(pool: Pool, webhook_id: UUID) -> int:
    """Finish the open deliveries of a deleted config as cancelled; returns how many.

    In transactions of their own, since there may be a million. What one that breaks off leaves, and
    the few that other statements hold right now, the claims cancel that come across them.
    """
    cancelled = 0
    while (count := await cancel_some(pool, webhook_id)) == _CHUNK:
        cancelled += count
    return cancelled + count


async def cancel_some(connection: Connection, webhook_id: UUID) -> int:
    """The same with one statement, for as many as it may take."""
    tag: str = await connection.execute(_CANCEL_WEBHOOK, webhook_id, _CHUNK)
    return int(tag.rpartition(" ")[2])
