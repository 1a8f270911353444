"""Ordered delivery: one delivery of a chain at a time, in the order of acceptance.

A chain is what is open of one ordering key for one webhook config. Only its first may be ready,
parked or leased; the others are blocked. Positions are given under a lock of the key that is held
until the commit, so they follow the commits. Whatever ends a first promotes the next, after its own
commit, and so does an acceptance behind one: of the two at the same time at least one then sees
both, and an engine never waits for a server. A process that dies in between leaves its chain
to the sweep.
"""

from collections.abc import Iterable, Sequence
from uuid import UUID
from zlib import crc32

from core.postgres.planner import equal, hidden
from core.queue.types import Chain, Connection, NewEvent

#: Keys share this many locks: PostgreSQL has room for 6,400 by default, for all transactions
#: together. Two keys that share one only wait for each other's commits. Which lock a key has must
#: be the same in releases that run side by side.
_LOCKS = 4096
#: Keeps them apart from advisory locks for other purposes.
_LOCK_SPACE = 0x6F726472
_NO_CHAIN = Chain(UUID(int=0), "")

_LOCK = """
SELECT count(pg_advisory_xact_lock($1, t.lock)) FROM unnest($2::int[]) AS t(lock)
"""


# Right however old the snapshot is: a later acceptance comes behind, and what is gone stays gone.
_PROMOTE = f"""
WITH next AS (
    SELECT b.id
    FROM unnest($1::uuid[], $2::text[]) AS t(webhook_id, ordering_key)
    CROSS JOIN LATERAL (
        SELECT q.id FROM delivery_queue q
        WHERE q.webhook_id = t.webhook_id AND q.ordering_key = t.ordering_key
            AND q.state = 'blocked'
        ORDER BY q.ordering_position LIMIT 1
    ) b
    WHERE (
        SELECT true FROM delivery_queue q
        WHERE q.webhook_id = t.webhook_id AND q.ordering_key = t.ordering_key
            AND q.state <> 'blocked' LIMIT 1
    ) IS NULL
), locked AS (
    -- Chosen before locked: what somebody else promotes or cancels now is passed by, and never the
    -- one behind it taken instead.
    SELECT id FROM delivery_queue
    WHERE id = ANY (ARRAY(SELECT id FROM next)) AND {hidden("state")} = 'blocked'
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q
SET state = CASE WHEN (
        SELECT c.active AND c.breaker_open_until IS NULL FROM webhook_configs c
        WHERE c.id = q.webhook_id
    ) THEN 'ready' ELSE 'parked' END,
    due_at = greatest(now(), (SELECT e.not_before FROM events e WHERE e.id = q.event_id))
FROM locked WHERE {equal("q.id", "locked.id")}
RETURNING q.id
"""  # noqa: S608 - of constants


# A loose index scan: one probe a chain, however long the chains are.
_CHAINS = """
WITH RECURSIVE chains AS (
    (
        SELECT webhook_id, ordering_key FROM delivery_queue
        WHERE state = 'blocked' AND (webhook_id, ordering_key) > ($1, $2)
        ORDER BY webhook_id, ordering_key LIMIT 1
    )
    UNION ALL
    SELECT n.webhook_id, n.ordering_key FROM chains c CROSS JOIN LATERAL (
        SELECT q.webhook_id, q.ordering_key FROM delivery_queue q
        WHERE q.state = 'blocked'
            AND (q.webhook_id, q.ordering_key) > (c.webhook_id, c.ordering_key)
        ORDER BY q.webhook_id, q.ordering_key LIMIT 1
    ) n
)
SELECT webhook_id, ordering_key FROM chains LIMIT $3
"""


async def lock_keys(connection: Connection, events: Iterable[NewEvent]) -> None:
    """Wait until no other transaction accepts events of these ordering keys, and keep it so.

    To be called in a transaction, in a statement before the one that reads the chains.
    """
    # In one order everywhere, so nobody waits in a circle.
    locks = sorted({_lock(event) for event in events if event.ordering_key is not None})
    await connection.execute(_LOCK, _LOCK_SPACE, locks)


async def promote(connection: Connection, chains: Sequence[Chain]) -> int:
    """Let the next delivery of each chain go whose first has ended; returns how many.

    To be called after the commit of what may have ended a first, or put another behind it.
    """
    rows = await connection.fetch(
        _PROMOTE, [c.webhook_id for c in chains], [c.ordering_key for c in chains]
    )
    return len(rows)


async def chains_after(connection: Connection, chain: Chain | None, limit: int) -> list[Chain]:
    """The chains with something blocked in them that come next, in any fixed order."""
    after = chain or _NO_CHAIN
    rows = await connection.fetch(_CHAINS, after.webhook_id, after.ordering_key, limit)
    return [Chain(row["webhook_id"], row["ordering_key"]) for row in rows]


def _lock(event: NewEvent) -> int:
    return crc32(f"{event.merchant_id}\0{event.ordering_key}".encode()) % _LOCKS
