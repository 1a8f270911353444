"""What somebody else has locked: a session that is idle in its transaction, say, for hours."""

from collections.abc import Collection, Sequence
from uuid import UUID

from core.lifecycle import DeliveryState
from core.lookup import equal
from core.queue.records import Connection, Settlement

# What is free is locked here, so that the settle that follows in the same transaction waits for
# nobody. It writes the configs of what failed for good, and those that have failures to forgive.
_HELD = f"""
WITH free AS (
    SELECT id, webhook_id FROM delivery_queue WHERE id = ANY ($1) FOR UPDATE SKIP LOCKED
), wanted AS (
    SELECT c.id FROM free f JOIN webhook_configs c ON {equal("c.id", "f.webhook_id")}
    WHERE f.id = ANY ($2) OR c.consecutive_failures > 0
), locked AS (
    SELECT id FROM webhook_configs WHERE id = ANY (ARRAY(SELECT id FROM wanted))
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT id FROM delivery_queue WHERE id = ANY ($1) AND id NOT IN (
    SELECT id FROM free
    WHERE webhook_id NOT IN (SELECT id FROM wanted EXCEPT SELECT id FROM locked)
)
"""  # noqa: S608 - of constants


_HELD_WEBHOOKS = """
WITH free AS (
    SELECT id FROM webhook_configs WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
SELECT id FROM webhook_configs WHERE id = ANY ($1) AND id NOT IN (SELECT id FROM free)
"""


async def held(connection: Connection, settlements: Sequence[Settlement]) -> set[UUID]:
    """The deliveries of these that cannot be settled now without waiting for somebody's lock."""
    failed = [s.delivery_id for s in settlements if s.final_state is DeliveryState.FAILED]
    rows = await connection.fetch(_HELD, [s.delivery_id for s in settlements], failed)
    return {row["id"] for row in rows}


async def held_webhooks(connection: Connection, webhook_ids: Collection[UUID]) -> set[UUID]:
    """The configs of these that somebody has locked; the others are, from now on, by us."""
    rows = await connection.fetch(_HELD_WEBHOOKS, list(webhook_ids))
    return {row["id"] for row in rows}
