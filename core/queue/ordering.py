"""Ordered delivery: the deliveries of a chain go one at a time, in the order of acceptance.

A chain is the open deliveries of one ordering key to one webhook config. Its first delivery may be
ready, parked or leased; the others are blocked. A lock on the key, held until the commit, makes
positions follow the commits.

Two events promote the next delivery: the end of the first one, after its commit, and the acceptance
of one behind it. If both happen at once, at least one of them sees the other. A process that dies
in between leaves the chain to the engines' sweep.
"""

from collections.abc import Iterable, Sequence
from uuid import UUID
from zlib import crc32

from core.postgres.planner import equal, hidden
from core.postgres.protocols import Executor
from core.queue.types import Chain, NewEvent

#: Keys share this many locks, because PostgreSQL has 6,400 by default for all transactions. Two
#: keys with one lock wait for each other's commits. Releases that run side by side must map keys to
#: locks in the same way.
_LOCKS = 4096
#: Separates these advisory locks from others. The digits spell "ordr".
_LOCK_SPACE = 0x6F726472
_NO_CHAIN = Chain(UUID(int=0), "")

_LOCK = """
SELECT count(pg_advisory_xact_lock($1, t.lock)) FROM unnest($2::int[]) AS t(lock)
"""


# Correct with any snapshot: a later acceptance has a higher position, and an ended delivery stays
# ended.
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
    -- Chosen before locked, so that a delivery that another session promotes is skipped and the one
    -- behind it is not taken instead.
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


# A loose index scan with one probe per chain.
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


async def lock_keys(connection: Executor, events: Iterable[NewEvent]) -> None:
    """Lock the ordering keys of these events until the transaction ends.

    Call it in the transaction, before the statement that reads the chains.
    """
    # Sorted, so that transactions do not deadlock.
    locks = sorted({_lock(event) for event in events if event.ordering_key is not None})
    await connection.execute(_LOCK, _LOCK_SPACE, locks)


async def promote(connection: Executor, chains: Sequence[Chain]) -> int:
    """Make the next delivery of each chain ready if its first has ended, and return their number.

    Call it after the commit that may have ended a first delivery or added one behind it.
    """
    rows = await connection.fetch(
        _PROMOTE, [c.webhook_id for c in chains], [c.ordering_key for c in chains]
    )
    return len(rows)


async def chains_after(connection: Executor, chain: Chain | None, limit: int) -> list[Chain]:
    """Return the next chains that have blocked deliveries, in a fixed order."""
    after = chain or _NO_CHAIN
    rows = await connection.fetch(_CHAINS, after.webhook_id, after.ordering_key, limit)
    return [Chain(row["webhook_id"], row["ordering_key"]) for row in rows]


def _lock(event: NewEvent) -> int:
    return crc32(f"{event.merchant_id}\0{event.ordering_key}".encode()) % _LOCKS
