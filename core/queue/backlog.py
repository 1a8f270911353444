"""What configs cannot take now: parked in their own backlogs, let in again as they have room."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from core.postgres.planner import equal, hidden
from core.queue.claim import fences
from core.queue.types import Connection, LeasedDelivery


def park_ready(configs: str, due: str, most: str = "ALL") -> str:
    """A statement that parks what is ready and so due of the `configs`, rows `c(webhook_id)`, and
    of each at most so many."""
    return f"""
        UPDATE delivery_queue q SET state = 'parked'
        WHERE q.id = ANY (ARRAY(
            SELECT r.id FROM {configs} CROSS JOIN LATERAL (
                SELECT q.id FROM delivery_queue q
                WHERE {equal("q.webhook_id", "c.webhook_id")} AND q.state <> 'parked'
                    AND q.due_at {due} AND {hidden("q.state")} = 'ready'
                -- Or it would be joined, and by the due time alone.
                LIMIT {most} OFFSET 0
            ) r
        )) AND {hidden("q.state")} = 'ready' AND q.due_at {due}
    """  # noqa: S608 - of constants


# The due time says nothing here, but keeps what is blocked out of the scan.
_PARK_WEBHOOKS = park_ready("unnest($1::uuid[]) AS c(webhook_id)", "< 'infinity'")


_PARK_DUE = park_ready("unnest($1::uuid[]) AS c(webhook_id)", "<= now()", most="10000")


_PARK_LEASED = f"""
UPDATE delivery_queue q SET state = 'parked', lease_id = NULL, lease_until = NULL
FROM unnest($1::uuid[], $2::uuid[]) AS t(id, lease_id)
WHERE {equal("q.id", "t.id")} AND q.lease_id = t.lease_id
"""  # noqa: S608 - of constants


#: The head of a statement, with `backlogs`: the configs that have one. A loose index scan, of one
#: probe per config that is read, however long the backlogs are.
BACKLOGS = """
WITH RECURSIVE probe AS (
    (SELECT webhook_id FROM delivery_queue WHERE state = 'parked' ORDER BY webhook_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT q.webhook_id FROM delivery_queue q
        WHERE q.state = 'parked' AND q.webhook_id > p.webhook_id
        ORDER BY q.webhook_id LIMIT 1
    ) FROM probe p WHERE p.webhook_id IS NOT NULL
), backlogs AS (
    SELECT webhook_id FROM probe WHERE webhook_id IS NOT NULL
)
"""

_WEBHOOKS_WITH_BACKLOG = f"{BACKLOGS} SELECT webhook_id FROM backlogs"  # noqa: S608 - of constants


# How many webhooks a config's rate leaves now: what came back since it was used up, at most a
# second's and one. A rate is kept in one column, for all engines together. It is in the future only
# by as much as two statements are apart, or when the database's clock was set back: then it counts
# as never used, or the config would get nothing until that time, whatever comes in.
_TOKENS = """
    least(c.rate_limit + 1, c.rate_limit * extract(epoch FROM now() - CASE
        WHEN c.rate_used_until < now() + interval '1 minute' THEN c.rate_used_until
    END)::float8)
"""


# Fills a config's ready part from its own backlog once it is half empty: one by one would cost an
# index update per settle. Let in "now", not at the old due time, so nobody else's turn is taken.
# What a deleted config still has parked (accepted while it was deleted) is let in too: its claim
# cancels it. A rate lets in as many as it leaves beside those that are already waiting for it. An
# open breaker lets in nothing; a half-open one the first that is due, when no other is on its way.
_ADMIT = f"""
WITH room AS (
    SELECT c.id, c.breaker_open_until IS NULL AS closed, p.places, p.places - t.taken AS free,
        CASE WHEN c.rate_limit > 0 THEN floor({_TOKENS})::bigint - t.ready END AS tokens
    FROM webhook_configs c JOIN unnest($1::uuid[], $2::int[]) AS a(id, places)
        ON {equal("c.id", "a.id")}
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.breaker_open_until IS NULL
            THEN least(a.places, nullif(c.max_in_flight, 0)) ELSE 1 END AS places
    ) p
    CROSS JOIN LATERAL (
        SELECT count(*) AS taken, count(*) FILTER (WHERE state = 'ready') AS ready FROM (
            SELECT q.state FROM delivery_queue q
            WHERE q.webhook_id = c.id AND q.state <> 'parked' AND q.due_at <= now() LIMIT p.places
        ) due
    ) t
    WHERE c.deleted_at IS NOT NULL
        OR (c.active AND (c.breaker_open_until IS NULL OR c.breaker_open_until <= now()))
), chosen AS (
    SELECT p.id FROM room r CROSS JOIN LATERAL (
        SELECT q.id FROM delivery_queue q
        WHERE q.webhook_id = r.id AND q.state = 'parked' AND (r.closed OR q.due_at <= now())
        ORDER BY q.id LIMIT greatest(least(r.free, r.tokens, $3::int), 0)
    ) p
    WHERE r.free >= (r.places + 1) / 2
), locked AS (
    -- Chosen before locked: engines that do this at once choose the same rows, and the second finds
    -- them taken instead of letting in as many again.
    SELECT id FROM delivery_queue
    WHERE id = ANY (ARRAY(SELECT id FROM chosen)) AND {hidden("state")} = 'parked'
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q SET state = 'ready', due_at = greatest(q.due_at, now())
FROM locked WHERE {equal("q.id", "locked.id")}
RETURNING q.webhook_id
"""  # noqa: S608 - of constants


# Passes by a config that somebody else has locked: its deliveries are parked, and ask again.
_SPEND_RATE = f"""
WITH wanting AS (
    SELECT c.id, c.rate_limit, a.wanted, {_TOKENS} AS tokens
    FROM webhook_configs c JOIN unnest($1::uuid[], $2::int[]) AS a(id, wanted)
        ON {equal("c.id", "a.id")}
    WHERE c.rate_limit > 0
    FOR NO KEY UPDATE OF c SKIP LOCKED
), granted AS (
    SELECT *, greatest(least(floor(tokens), wanted), 0) AS granted FROM wanting
)
UPDATE webhook_configs c
SET rate_used_until = now() - (g.tokens - g.granted) / g.rate_limit * interval '1 second'
FROM granted g WHERE {equal("c.id", "g.id")}
RETURNING c.id, g.granted::int, greatest(1 - g.tokens + g.granted, 0) / g.rate_limit AS next_in
"""  # noqa: S608 - of constants


async def park_webhooks(connection: Connection, webhook_ids: Sequence[UUID]) -> None:
    """Move what these configs have ready into their backlogs."""
    await connection.execute(_PARK_WEBHOOKS, webhook_ids)


async def park_due(connection: Connection, webhook_ids: Sequence[UUID]) -> None:
    """Move what these configs have ready and due into their backlogs, as far as one statement may.

    For crowds that no fan-out has parked: claim by claim they would be in everybody's way.
    """
    await connection.execute(_PARK_DUE, webhook_ids)


async def park_leased(connection: Connection, deliveries: Sequence[LeasedDelivery]) -> None:
    """Give up leases into the backlogs: their configs cannot take more now."""
    await connection.execute(_PARK_LEASED, *fences(deliveries))


async def webhooks_with_backlog(connection: Connection) -> list[UUID]:
    """The configs that have parked deliveries."""
    return [row["webhook_id"] for row in await connection.fetch(_WEBHOOKS_WITH_BACKLOG)]


async def admit(
    connection: Connection, places: Mapping[UUID, int], most: int | None = None
) -> set[UUID]:
    """Let parked deliveries in, not those of inactive configs; returns the configs that had some.

    Each config has at most so many due or leased deliveries in the ready part afterwards as it has
    `places` or its own cap allows, and no more due ones than its rate leaves; while its breaker is
    half-open, one; while it is open, none are let in. At a time no more than `most` of each.
    """
    rows = await connection.fetch(_ADMIT, list(places), list(places.values()), most)
    return {row["webhook_id"] for row in rows}


async def spend_rate(
    connection: Connection, wanted: Mapping[UUID, int]
) -> dict[UUID, tuple[int, float]]:
    """How many webhooks each of these configs may be sent now, by its rate limit, counted as sent;
    and the seconds until one more may be. A config missing from it can be sent none at present."""
    rows = await connection.fetch(_SPEND_RATE, list(wanted), list(wanted.values()))
    return {row["id"]: (row["granted"], row["next_in"]) for row in rows}
