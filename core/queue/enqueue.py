"""How deliveries come into being with their event; and the hint of it."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from core.postgres.planner import equal
from core.postgres.pool import RETRYABLE_ERRORS, Pool
from core.queue.ordering import lock_keys, promote
from core.queue.types import Chain, Connection, NewEvent

#: Channel of the hint that something became due. A hint only: engines poll as well.
CHANNEL = "postrider_due"

#: Fields of an event that every event has, which are its first ones.
_REQUIRED = NewEvent._fields.index("payload") + 1

#: Events of one merchant, at once or in a second, from which on they are a crowd.
BURST_EVENTS = 25

#: Deliveries of one config that are due or being attempted, beyond which new ones are parked: more
#: than it takes to keep its places busy, and so few that nobody waits for a flood to be claimed.
_READY_MAX = 100


#: Whether the config w has a backlog, whose turn is before any new delivery's. Not EXISTS, for
#: which the planner may think of reading all backlogs.
HAS_BACKLOG = """
    (
        SELECT true FROM delivery_queue p WHERE p.webhook_id = w.id AND p.state = 'parked' LIMIT 1
    ) IS NOT NULL
"""


# How many deliveries of the config w are due or being attempted, as far as it matters.
_DUE = f"""
    (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue q
            WHERE q.webhook_id = w.id AND q.state <> 'parked' AND q.due_at <= now()
            LIMIT {_READY_MAX}
        ) due
    )
"""  # noqa: S608 - of constants


# Whether a new delivery of the config w is ready. What has a later time is nobody's rival before,
# and parked it would come behind its turn.
_STATE = f"""
    CASE WHEN w.active AND (w.later OR (w.closed AND NOT {HAS_BACKLOG} {{also}})) THEN 'ready'
        ELSE 'parked' END
"""
_STATE_ALONE = _STATE.format(also="")
#: In a crowd only as many as there is room for; to look costs a lone event more than its rest.
STATE_IN_CROWD = _STATE.format(also=f"AND w.rank <= {_READY_MAX} - {_DUE}")

# One statement per batch, whatever its size: keys, events, and a delivery per matching config.
_ACCEPT = f"""
WITH input AS (
    SELECT * FROM unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::bytea[],
        $8::timestamptz[], $9::text[], $10::text[], $11::int[]
    ) WITH ORDINALITY AS t(id, merchant_id, type, content_type, payload, idempotency_key,
        content_hash, not_before, ordering_key, trace_parent, rank, position)
), new_keys AS (
    INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)
    SELECT merchant_id, idempotency_key, content_hash, id FROM input
    WHERE idempotency_key IS NOT NULL
    -- Two batches that share keys take them in one order, so neither waits for the other for ever.
    ORDER BY merchant_id, idempotency_key, position
    ON CONFLICT DO NOTHING
    RETURNING event_id
), accepted AS (
    SELECT id, merchant_id, type, content_type, payload, not_before, ordering_key, trace_parent,
        rank, position
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
    SELECT a.id AS event_id, a.merchant_id, a.type, a.not_before, a.rank, a.position,
        a.not_before > now() IS TRUE AS later, c.id, c.active,
        c.breaker_open_until IS NULL AS closed,
        CASE WHEN c.ordered THEN a.ordering_key END AS ordering_key
    FROM accepted a
    JOIN filters f ON f.type = a.type
    JOIN webhook_configs c
        ON {equal("c.merchant_id", "a.merchant_id")}
        AND c.deleted_at IS NULL AND c.events && f.names
), {{queued}}, counts AS (
    SELECT event_id, count(*) AS deliveries FROM matched GROUP BY event_id
), stored AS (
    INSERT INTO events
        (id, merchant_id, type, content_type, payload, delivery_count, not_before, ordering_key,
        trace_parent)
    SELECT a.id, a.merchant_id, a.type, a.content_type, a.payload, coalesce(n.deliveries, 0),
        a.not_before, a.ordering_key, a.trace_parent
    FROM accepted a LEFT JOIN counts n ON n.event_id = a.id
    RETURNING id, delivery_count
)
-- One row, since each has its price where it is read; now() is the default of created_at.
SELECT now() AS accepted_at, ARRAY(
    SELECT s.delivery_count FROM input i LEFT JOIN stored s ON s.id = i.id ORDER BY i.position
) AS delivery_counts{{also}}
"""  # noqa: S608 - of constants

_QUEUED = """queued AS (
    INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at)
    SELECT new_uuid7(), w.id, w.event_id, w.merchant_id, w.type, {state},
        greatest(now(), w.not_before)
    FROM matched w
)"""

# Behind what its chain holds already; the first of a chain is queued as it would be without one.
_QUEUED_IN_ORDER = f"""placed AS (
    SELECT m.*, CASE WHEN ordering_key IS NOT NULL THEN coalesce(b.last, f.position, 0)
        + row_number() OVER (PARTITION BY m.id, ordering_key ORDER BY m.position)
        END AS ordering_position
    FROM matched m
    LEFT JOIN LATERAL (
        SELECT q.ordering_position AS last FROM delivery_queue q
        WHERE q.webhook_id = m.id AND q.ordering_key = m.ordering_key AND q.state = 'blocked'
        ORDER BY q.ordering_position DESC LIMIT 1
    ) b ON true
    LEFT JOIN LATERAL (
        SELECT q.ordering_position AS position FROM delivery_queue q
        WHERE q.webhook_id = m.id AND q.ordering_key = m.ordering_key AND q.state <> 'blocked'
    ) f ON true
), queued AS (
    INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at,
        ordering_key, ordering_position)
    SELECT new_uuid7(), w.id, w.event_id, w.merchant_id, w.type,
        CASE WHEN w.ordering_position > 1 THEN 'blocked' ELSE {_STATE_ALONE} END,
        CASE WHEN w.ordering_position > 1 THEN 'infinity' ELSE greatest(now(), w.not_before) END,
        w.ordering_key, w.ordering_position
    FROM placed w
    RETURNING webhook_id, ordering_key, state
)"""  # noqa: S608 - of constants

_ENQUEUE = _ACCEPT.format(queued=_QUEUED.format(state=_STATE_ALONE), also="")
_ENQUEUE_BURST = _ACCEPT.format(queued=_QUEUED.format(state=STATE_IN_CROWD), also="")
_ENQUEUE_IN_ORDER = _ACCEPT.format(
    queued=_QUEUED_IN_ORDER,
    also=""", ARRAY(
    SELECT DISTINCT ROW(webhook_id, ordering_key) FROM queued WHERE state = 'blocked'
) AS blocked""",
)


class Accepted(NamedTuple):
    """What a batch came to: when, and how many deliveries each of its events has, in their order.

    None stands for an event that met an idempotency key that was there before, or earlier in the
    batch.
    """

    accepted_at: datetime
    delivery_counts: Sequence[int | None]


async def enqueue(
    connection: Connection, events: Sequence[NewEvent], *, burst: bool = False
) -> Accepted:
    """Accept events: store them, a delivery per matching config, and their place in the queue.

    What its config cannot take yet is parked at once: all of it beside a backlog, and of a crowd
    what exceeds the config's room. Many events of one merchant here are a crowd; so is, at the
    caller's word, what belongs to one that comes in by and by.
    """
    ranks = _ranks(events) if burst or len(events) > BURST_EVENTS else ()
    statement = _ENQUEUE_BURST if burst or max(ranks, default=0) > BURST_EVENTS else _ENQUEUE
    [accepted] = await connection.fetch(statement, *_columns(events), ranks)
    return Accepted(*accepted)


async def enqueue_in_order(pool: Pool, events: Sequence[NewEvent]) -> Accepted:
    """As enqueue(), in a transaction of its own, for events of which some have an ordering key.

    Events of one key are accepted in the order of their commits, and in a batch in its order.
    """
    # Each statement has to see what was committed before it, whatever the database's default is.
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="read_committed"),
    ):
        await lock_keys(connection, events)
        [row] = await connection.fetch(_ENQUEUE_IN_ORDER, *_columns(events), ())
    *accepted, blocked = row
    if blocked:
        # Their first may have ended meanwhile. Accepted they are in any case.
        with suppress(*RETRYABLE_ERRORS):
            await promote(pool, [Chain(*chain) for chain in blocked])
    return Accepted(*accepted)


def _columns(events: Sequence[NewEvent]) -> list[Sequence[Any]]:
    """The statements' parameters, a field of the events each.

    What none of them has is an empty array, which unnest fills up with nulls: of what is sent,
    every single value has its price.
    """
    required, optional = slice(_REQUIRED), slice(_REQUIRED, None)
    columns: list[Sequence[Any]] = list(zip(*events, strict=True))
    return [*columns[required], *(column if any(column) else () for column in columns[optional])]


def _ranks(events: Sequence[NewEvent]) -> list[int]:
    """Each event's place among those of its merchant, from 1."""
    seen: Counter[str] = Counter()
    ranks = []
    for event in events:
        seen[event.merchant_id] += 1
        ranks.append(seen[event.merchant_id])
    return ranks


async def notify(connection: Connection) -> None:
    """Tell listening engines to look; outside the transaction that enqueued."""
    await connection.execute(f"NOTIFY {CHANNEL}")
