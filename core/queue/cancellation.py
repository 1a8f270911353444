"""The end of a deleted config's open deliveries."""

from uuid import UUID

from core.lookup import equal
from core.queue.records import Connection

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
    SELECT id FROM parked UNION ALL SELECT id FROM others LIMIT $2
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


async def cancel_webhook(connection: Connection, webhook_id: UUID, limit: int | None = None) -> int:
    """Finish the open deliveries of a deleted config as cancelled; returns how many.

    At most `limit` of them, where one is given. The few that other statements hold right now are
    left to the next claim, which cancels them.
    """
    tag: str = await connection.execute(_CANCEL_WEBHOOK, webhook_id, limit)
    return int(tag.rpartition(" ")[2])
