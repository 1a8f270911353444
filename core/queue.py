"""The queue: every statement that moves an open delivery, side by side.

Ready, parked and leased rows are one table; final states leave it. Only the database's clock
decides. A claim is a lease; every statement that ends a lease is fenced by its id, so an engine
that was frozen and wakes late changes nothing. Each function takes the caller's connection and runs
in its transaction, if it has one; docs/architecture.md draws the states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from core.ids import new_id
from core.lifecycle import DeliveryState, Outcome

#: asyncpg connection, or a pool (which runs each statement on a connection of its own).
type Connection = Any

#: Channel of the hint that something became due. A hint only: engines poll as well.
CHANNEL = "postrider_due"


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that passed validation; `content_hash` matters only beside an idempotency key."""

    id: UUID
    merchant_id: str
    type: str
    content_type: str
    payload: bytes
    idempotency_key: str | None
    content_hash: bytes
    not_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class LeasedDelivery:
    """A claimed delivery with all an attempt needs except its webhook config."""

    id: UUID
    lease_id: UUID
    webhook_id: UUID
    #: Version of the config at the claim, and whether it may be called at all.
    webhook_version: int
    webhook_active: bool
    webhook_deleted: bool
    event_id: UUID
    event_type: str
    content_type: str
    payload: bytes
    attempt_count: int
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class Settlement:
    """The result of one attempt, and what follows: a final state, or a wait before the next."""

    delivery_id: UUID
    lease_id: UUID
    outcome: Outcome
    status_code: int | None
    detail: str
    started_at: datetime
    duration_us: int
    final_state: DeliveryState | None
    retry_after_seconds: float
    dns_us: int | None = None
    connect_us: int | None = None
    first_byte_us: int | None = None
    remote_address: str | None = None
    response_excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a settle changed: deliveries whose lease still held, and configs it deactivated."""

    delivery_ids: frozenset[UUID]
    deactivated_webhook_ids: tuple[UUID, ...]


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

_CLAIM = """
WITH due AS (
    SELECT id FROM delivery_queue
    WHERE state = 'ready' AND due_at <= now()
    ORDER BY due_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED
), leased AS (
    UPDATE delivery_queue q
    SET state = 'leased', lease_id = $2, lease_until = now() + $3
    FROM due WHERE q.id = due.id
    RETURNING q.id, q.webhook_id, q.event_id, q.event_type, q.attempt_count
)
SELECT l.id, l.webhook_id, c.version AS webhook_version, c.active AS webhook_active,
    c.deleted_at IS NOT NULL AS webhook_deleted, l.event_id, l.event_type, e.content_type,
    e.payload, l.attempt_count, now() AS claimed_at
FROM leased l
JOIN webhook_configs c ON c.id = l.webhook_id
JOIN events e ON e.id = l.event_id
"""

# Deletes or reschedules, writes the attempts, and counts failures per config, in one statement.
# Only rows whose lease still holds take part in any of it.
_SETTLE = """
WITH input AS (
    SELECT * FROM unnest(
        $1::uuid[], $2::uuid[], $3::text[], $4::int[], $5::text[], $6::timestamptz[], $7::int[],
        $8::text[], $9::float8[], $11::int[], $12::int[], $13::int[], $14::text[], $15::text[]
    ) WITH ORDINALITY AS t(delivery_id, lease_id, outcome, status_code, detail, started_at,
        duration_us, final_state, retry_after, dns_us, connect_us, first_byte_us, remote_address,
        response_excerpt, position)
), finished AS (
    DELETE FROM delivery_queue q USING input i
    WHERE q.id = i.delivery_id AND q.lease_id = i.lease_id AND i.final_state IS NOT NULL
    RETURNING q.*, i.final_state, i.outcome, i.position
), history AS (
    INSERT INTO finished_deliveries
        (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
        redelivery_of)
    SELECT id, final_state, webhook_id, event_id, merchant_id, event_type, attempt_count + 1,
        created_at, redelivery_of
    FROM finished
), rescheduled AS (
    UPDATE delivery_queue q
    SET state = 'ready', lease_id = NULL, lease_until = NULL, attempt_count = q.attempt_count + 1,
        due_at = now() + i.retry_after * interval '1 second'
    FROM input i
    WHERE q.id = i.delivery_id AND q.lease_id = i.lease_id AND i.final_state IS NULL
    RETURNING q.id, q.attempt_count, i.position
), settled AS (
    SELECT id, position, attempt_count + 1 AS number FROM finished
    UNION ALL
    SELECT id, position, attempt_count FROM rescheduled
), recorded AS (
    -- By position: the batch may hold a delivery twice, once under a lease that is lost.
    INSERT INTO attempts
        (delivery_id, number, outcome, status_code, detail, started_at, duration_us, dns_us,
        connect_us, first_byte_us, remote_address, response_excerpt)
    SELECT s.id, s.number, i.outcome, i.status_code, i.detail, i.started_at, i.duration_us,
        i.dns_us, i.connect_us, i.first_byte_us, i.remote_address, i.response_excerpt
    FROM settled s JOIN input i ON i.position = s.position
), tally AS (
    SELECT webhook_id, last_delivered IS NOT NULL AS delivered,
        count(*) FILTER (
            WHERE final_state = 'failed' AND outcome <> 'internal_error'
            AND position > coalesce(last_delivered, 0)
        ) AS failures
    FROM (
        SELECT *, max(position) FILTER (WHERE final_state = 'delivered')
            OVER (PARTITION BY webhook_id) AS last_delivered
        FROM finished
    ) f
    GROUP BY webhook_id, last_delivered
), locked AS (
    -- Healthy configs are not written at all; the others are locked in one order by every engine.
    SELECT c.id, c.active,
        CASE WHEN t.delivered THEN 0 ELSE c.consecutive_failures END + t.failures AS failures
    FROM webhook_configs c JOIN tally t ON t.webhook_id = c.id
    WHERE t.failures > 0 OR (t.delivered AND c.consecutive_failures > 0)
    ORDER BY c.id
    FOR NO KEY UPDATE OF c
), counted AS (
    UPDATE webhook_configs c
    SET consecutive_failures = l.failures,
        active = c.active AND l.failures < $10,
        deactivation_reason = CASE WHEN c.active AND l.failures >= $10 THEN 'failures'
            ELSE c.deactivation_reason END,
        version = c.version + CASE WHEN c.active AND l.failures >= $10 THEN 1 ELSE 0 END,
        updated_at = CASE WHEN c.active AND l.failures >= $10 THEN now() ELSE c.updated_at END
    FROM locked l WHERE c.id = l.id
    RETURNING c.id, l.active AND NOT c.active AS deactivated
)
SELECT id, false AS deactivated FROM settled
UNION ALL
SELECT id, true FROM counted WHERE deactivated
"""

_PARK_WEBHOOKS = """
UPDATE delivery_queue SET state = 'parked' WHERE webhook_id = ANY ($1) AND state = 'ready'
"""

_PARK_LEASED = """
UPDATE delivery_queue q SET state = 'parked', lease_id = NULL, lease_until = NULL
FROM unnest($1::uuid[], $2::uuid[]) AS t(id, lease_id)
WHERE q.id = t.id AND q.lease_id = t.lease_id
"""

_RELEASE = """
UPDATE delivery_queue q SET state = 'ready', lease_id = NULL, lease_until = NULL
FROM unnest($1::uuid[], $2::uuid[]) AS t(id, lease_id)
WHERE q.id = t.id AND q.lease_id = t.lease_id
"""

# Passes by what another statement holds at this moment: to wait for a settle, which may itself be
# waiting for the config our caller has locked, would be a deadlock. The next claim cancels those.
_CANCEL_WEBHOOK = """
WITH free AS (
    -- Says nothing, but lets the two indexes be used, each of which has one part of the queue.
    SELECT id FROM delivery_queue
    WHERE webhook_id = $1 AND (state = 'parked' OR state <> 'parked')
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), cancelled AS (
    DELETE FROM delivery_queue q USING free WHERE q.id = free.id RETURNING q.*
)
INSERT INTO finished_deliveries
    (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of)
SELECT id, 'cancelled', webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of
FROM cancelled
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

# A loose index scan: one probe per config that has a backlog, however long the backlogs are.
_WEBHOOKS_WITH_BACKLOG = """
WITH RECURSIVE backlog AS (
    (SELECT webhook_id FROM delivery_queue WHERE state = 'parked' ORDER BY webhook_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT q.webhook_id FROM delivery_queue q
        WHERE q.state = 'parked' AND q.webhook_id > b.webhook_id
        ORDER BY q.webhook_id LIMIT 1
    ) FROM backlog b WHERE b.webhook_id IS NOT NULL
)
SELECT webhook_id FROM backlog WHERE webhook_id IS NOT NULL
"""

# How many webhooks a config's rate leaves now: what came back since it was used up, at most a
# second's and one. A rate is kept in one column, for all engines together.
_TOKENS = """
    least(c.rate_limit + 1, c.rate_limit * extract(epoch FROM now() - c.rate_used_until)::float8)
"""

# Fills a config's ready part from its own backlog once it is half empty: one by one would cost an
# index update per settle. Let in "now", not at the old due time, so nobody else's turn is taken.
# What a deleted config still has parked (accepted while it was deleted) is let in too: its claim
# cancels it. A rate lets in as many as it leaves beside those that are already waiting for it.
_ADMIT = f"""
WITH room AS (
    SELECT c.id, p.places, p.places - t.taken AS free,
        CASE WHEN c.rate_limit > 0 THEN floor({_TOKENS})::bigint - t.ready END AS tokens
    FROM webhook_configs c
    CROSS JOIN LATERAL (SELECT least($2, nullif(c.max_in_flight, 0)) AS places) p
    CROSS JOIN LATERAL (
        SELECT count(*) AS taken, count(*) FILTER (WHERE state = 'ready') AS ready FROM (
            SELECT q.state FROM delivery_queue q
            WHERE q.webhook_id = c.id AND q.state <> 'parked' AND q.due_at <= now() LIMIT p.places
        ) due
    ) t
    WHERE c.id = ANY ($1) AND (c.active OR c.deleted_at IS NOT NULL)
), chosen AS (
    SELECT p.id FROM room r CROSS JOIN LATERAL (
        SELECT q.id FROM delivery_queue q
        WHERE q.webhook_id = r.id AND q.state = 'parked'
        ORDER BY q.id LIMIT greatest(least(r.free, r.tokens), 0)
    ) p
    WHERE r.free >= (r.places + 1) / 2
), locked AS (
    -- Chosen before locked: engines that do this at once choose the same rows, and the second finds
    -- them taken instead of letting in as many again.
    SELECT id FROM delivery_queue
    WHERE id = ANY (ARRAY(SELECT id FROM chosen)) AND state = 'parked'
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q SET state = 'ready', due_at = greatest(q.due_at, now())
FROM locked WHERE q.id = locked.id
RETURNING q.webhook_id
"""  # noqa: S608 - of constants

# Passes by a config that somebody else has locked: its deliveries are parked, and ask again.
_SPEND_RATE = f"""
WITH wanting AS (
    SELECT c.id, c.rate_limit, a.wanted, {_TOKENS} AS tokens
    FROM webhook_configs c JOIN unnest($1::uuid[], $2::int[]) AS a(id, wanted) ON a.id = c.id
    WHERE c.rate_limit > 0
    FOR NO KEY UPDATE OF c SKIP LOCKED
), granted AS (
    SELECT *, greatest(least(floor(tokens), wanted), 0) AS granted FROM wanting
)
UPDATE webhook_configs c
SET rate_used_until = now() - (g.tokens - g.granted) / g.rate_limit * interval '1 second'
FROM granted g WHERE c.id = g.id
RETURNING c.id, g.granted::int, greatest(1 - g.tokens + g.granted, 0) / g.rate_limit AS next_in
"""  # noqa: S608 - of constants

# The first reclaim is due at once; a delivery whose engines keep dying comes back ever slower.
_RECLAIM = """
WITH expired AS (
    SELECT id FROM delivery_queue
    WHERE state = 'leased' AND lease_until < now()
    ORDER BY lease_until
    LIMIT $1
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q
SET state = 'ready', lease_id = NULL, lease_until = NULL, reclaim_count = q.reclaim_count + 1,
    due_at = now() + (2 ^ least(q.reclaim_count, 9) - 1) * interval '1 second'
FROM expired WHERE q.id = expired.id
RETURNING q.id
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


async def claim(connection: Connection, limit: int, lease_seconds: float) -> list[LeasedDelivery]:
    """Take up to `limit` due deliveries under one new lease, the longest due first."""
    lease_id = new_id()
    rows = await connection.fetch(_CLAIM, limit, lease_id, timedelta(seconds=lease_seconds))
    return [LeasedDelivery(lease_id=lease_id, **row) for row in rows]


async def settle(
    connection: Connection, settlements: Sequence[Settlement], max_consecutive_failures: int
) -> Settled:
    """End leases with the results of their attempts; to be called in a transaction.

    A settlement whose lease no longer holds is ignored as a whole: no attempt, no count. Failures
    count in the order of the batch, and a delivered one forgives those before it.
    """
    rows = await connection.fetch(
        _SETTLE,
        [s.delivery_id for s in settlements],
        [s.lease_id for s in settlements],
        [s.outcome for s in settlements],
        [s.status_code for s in settlements],
        [s.detail for s in settlements],
        [s.started_at for s in settlements],
        [s.duration_us for s in settlements],
        [s.final_state for s in settlements],
        [s.retry_after_seconds for s in settlements],
        max_consecutive_failures,
        [s.dns_us for s in settlements],
        [s.connect_us for s in settlements],
        [s.first_byte_us for s in settlements],
        [s.remote_address for s in settlements],
        [s.response_excerpt for s in settlements],
    )
    deactivated = tuple(row["id"] for row in rows if row["deactivated"])
    if deactivated:
        await park_webhooks(connection, deactivated)
    return Settled(frozenset(row["id"] for row in rows if not row["deactivated"]), deactivated)


async def park_webhooks(connection: Connection, webhook_ids: Sequence[UUID]) -> None:
    """Move what these configs have ready into their backlogs."""
    await connection.execute(_PARK_WEBHOOKS, webhook_ids)


async def park_leased(connection: Connection, deliveries: Sequence[LeasedDelivery]) -> None:
    """Give up leases into the backlogs: their configs cannot take more now."""
    await connection.execute(_PARK_LEASED, *_fences(deliveries))


async def release(connection: Connection, deliveries: Sequence[LeasedDelivery]) -> None:
    """Give up leases at once, for another engine; it counts neither as attempt nor as reclaim."""
    await connection.execute(_RELEASE, *_fences(deliveries))


async def cancel_webhook(connection: Connection, webhook_id: UUID, limit: int | None = None) -> int:
    """Finish the open deliveries of a deleted config as cancelled; returns how many.

    At most `limit` of them, where one is given. The few that other statements hold right now are
    left to the next claim, which cancels them.
    """
    tag: str = await connection.execute(_CANCEL_WEBHOOK, webhook_id, limit)
    return int(tag.rpartition(" ")[2])


async def redeliver(connection: Connection, merchant_id: str, delivery_id: UUID) -> UUID | None:
    """Make a new delivery of a finished one's event, with a retry schedule of its own.

    None, and nothing made, when the merchant has no such finished delivery, its config is deleted
    or its event is no longer stored.
    """
    made: UUID | None = await connection.fetchval(_REDELIVER, merchant_id, delivery_id)
    return made


async def webhooks_with_backlog(connection: Connection) -> list[UUID]:
    """The configs that have parked deliveries."""
    return [row["webhook_id"] for row in await connection.fetch(_WEBHOOKS_WITH_BACKLOG)]


async def admit(connection: Connection, webhook_ids: Sequence[UUID], places: int) -> set[UUID]:
    """Let parked deliveries in, not those of inactive configs; returns the configs that had some.

    Each config has at most `places` due or leased deliveries in the ready part afterwards, or as
    many as its own cap allows, and no more due ones than its rate leaves.
    """
    return {row["webhook_id"] for row in await connection.fetch(_ADMIT, webhook_ids, places)}


async def spend_rate(
    connection: Connection, wanted: Mapping[UUID, int]
) -> dict[UUID, tuple[int, float]]:
    """How many webhooks each of these configs may be sent now, by its rate limit, counted as sent;
    and the seconds until one more may be. A config missing from it can be sent none at present."""
    rows = await connection.fetch(_SPEND_RATE, list(wanted), list(wanted.values()))
    return {row["id"]: (row["granted"], row["next_in"]) for row in rows}


async def reclaim(connection: Connection, limit: int) -> list[UUID]:
    """Return up to `limit` deliveries whose lease has ended to the queue."""
    return [row["id"] for row in await connection.fetch(_RECLAIM, limit)]


async def hint(connection: Connection) -> None:
    """Tell listening engines to look; outside the transaction that enqueued."""
    await connection.execute(f"NOTIFY {CHANNEL}")


def _fences(deliveries: Sequence[LeasedDelivery]) -> tuple[list[UUID], list[UUID]]:
    return [d.id for d in deliveries], [d.lease_id for d in deliveries]
