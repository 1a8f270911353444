"""Accepts events: one statement stores each event with a delivery per matching config."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from core.postgres.planner import equal
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Executor, Pool
from core.postgres.rows import RowColumns
from core.queue.ordering import lock_keys, promote
from core.queue.types import Chain, NewEvent

#: Channel that notifies engines of due deliveries. Engines also poll, so a lost one does no harm.
CHANNEL = "postrider_due"

#: Events of one merchant, in one call or in one second, above which they are a burst.
BURST_EVENTS = 25

#: Due and leased deliveries of one config, above which a burst is parked. It is more than the slots
#: of a config, and few enough that other merchants' deliveries are claimed soon.
_READY_MAX = 100

_EVENT = RowColumns(
    {
        "id": "uuid",
        "merchant_id": "text",
        "type": "text",
        "content_type": "text",
        "payload": "bytea",
        "idempotency_key": "text",
        "content_hash": "bytea",
        "not_before": "timestamptz",
        "ordering_key": "text",
        "trace_parent": "text",
    }
)

#: SQL: whether the config w has a backlog, which goes before new deliveries. The planner could
#: answer EXISTS by reading all backlogs.
HAS_BACKLOG = """
    (
        SELECT true FROM delivery_queue p WHERE p.webhook_id = w.id AND p.state = 'parked' LIMIT 1
    ) IS NOT NULL
"""


# SQL: the due and leased deliveries of the config w, counted up to _READY_MAX.
_DUE = f"""
    (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue q
            WHERE q.webhook_id = w.id AND q.state <> 'parked' AND q.due_at <= now()
            LIMIT {_READY_MAX}
        ) due
    )
"""  # noqa: S608 - of constants


# SQL: the state of a new delivery of the config w. A delivery with a future due time starts as
# ready: until then it competes with nothing, and if parked it would be admitted too late.
_STATE = f"""
    CASE WHEN w.active AND (w.later OR (w.closed AND NOT {HAS_BACKLOG} {{also}})) THEN 'ready'
        ELSE 'parked' END
"""
_STATE_ALONE = _STATE.format(also="")
#: In a burst, only as many as the ready part has room for. Single events skip this costly count.
STATE_IN_BURST = _STATE.format(also=f"AND w.rank <= {_READY_MAX} - {_DUE}")

# One statement per batch: idempotency keys, events, and a delivery per matching config.
_ACCEPT = f"""
WITH input AS (
    SELECT * FROM unnest({_EVENT.arrays}, ${_EVENT.next}::int[])
        WITH ORDINALITY AS t({_EVENT.names}, rank, position)
), new_keys AS (
    INSERT INTO idempotency_keys (merchant_id, key, content_hash, event_id)
    SELECT merchant_id, idempotency_key, content_hash, id FROM input
    WHERE idempotency_key IS NOT NULL
    -- Sorted, so that two batches that share keys do not deadlock.
    ORDER BY merchant_id, idempotency_key, position
    ON CONFLICT DO NOTHING
    RETURNING event_id
), accepted AS (
    SELECT id, merchant_id, type, content_type, payload, not_before, ordering_key, trace_parent,
        rank, position
    FROM input
    WHERE idempotency_key IS NULL OR id IN (SELECT event_id FROM new_keys)
), filters AS (
    -- The names that match a type in a config: the type, or a prefix with `.*`.
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
-- One row, because each row costs time to read. now() is the default of created_at.
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

# Positions continue those of the chain. The first of a chain is queued as if it had no key.
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
_ENQUEUE_BURST = _ACCEPT.format(queued=_QUEUED.format(state=STATE_IN_BURST), also="")
_ENQUEUE_IN_ORDER = _ACCEPT.format(
    queued=_QUEUED_IN_ORDER,
    also=""", ARRAY(
    SELECT DISTINCT ROW(webhook_id, ordering_key) FROM queued WHERE state = 'blocked'
) AS blocked""",
)


class Accepted(NamedTuple):
    """The time of acceptance, and the number of deliveries of each event in the batch's order.

    The number is None if the idempotency key exists already, or occurs earlier in the batch.
    """

    accepted_at: datetime
    delivery_counts: Sequence[int | None]


async def enqueue(
    connection: Executor, events: Sequence[NewEvent], *, burst: bool = False
) -> Accepted:
    """Store events with a delivery per matching config.

    A delivery is parked at once if its config has a backlog, or if it is part of a burst and the
    config has `_READY_MAX` others. More than BURST_EVENTS of one merchant are a burst. `burst`
    marks events that belong to one that arrives in several calls.
    """
    ranks = _ranks(events) if burst or len(events) > BURST_EVENTS else ()
    statement = _ENQUEUE_BURST if burst or max(ranks, default=0) > BURST_EVENTS else _ENQUEUE
    [accepted] = await connection.fetch(statement, *_EVENT.arguments(events), ranks)
    return Accepted(*accepted)


async def enqueue_in_order(pool: Pool, events: Sequence[NewEvent]) -> Accepted:
    """Do as enqueue() does, for events with ordering keys, in a separate transaction.

    Events of one key are ordered by their commits, and within a batch by their position.
    """
    # Each statement must see all earlier commits, independently of the database's default.
    async with (
        pool.acquire() as connection,
        connection.transaction(isolation="read_committed"),
    ):
        await lock_keys(connection, events)
        [row] = await connection.fetch(_ENQUEUE_IN_ORDER, *_EVENT.arguments(events), ())
    *accepted, blocked = row
    if blocked:
        # The first of a chain may have ended in between. The events are accepted either way.
        with suppress(*RETRYABLE_ERRORS):
            await promote(pool, [Chain(*chain) for chain in blocked])
    return Accepted(*accepted)


def _ranks(events: Sequence[NewEvent]) -> list[int]:
    """Return the number of each event among those of its merchant, from 1."""
    seen: Counter[str] = Counter()
    ranks = []
    for event in events:
        seen[event.merchant_id] += 1
        ranks.append(seen[event.merchant_id])
    return ranks


async def notify(connection: Executor) -> None:
    """Wake listening engines. Call it outside the transaction that enqueued."""
    await connection.execute(f"NOTIFY {CHANNEL}")
