"""Backlogs: deliveries that a config cannot take now are parked, and admitted as slots free up."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from core.postgres.planner import equal, hidden
from core.postgres.protocols import Executor
from core.queue.claim import fences
from core.queue.rate_limit import TOKENS
from core.queue.types import LeasedDelivery


def park_ready(configs: str, due: str, most: str = "ALL") -> str:
    """Return a statement that parks the ready deliveries of `configs`, rows `c(webhook_id)`.

    `due` is a condition on the due time. At most `most` deliveries of each config are parked.
    """
    return f"""
        UPDATE delivery_queue q SET state = 'parked'
        WHERE q.id = ANY (ARRAY(
            SELECT r.id FROM {configs} CROSS JOIN LATERAL (
                SELECT q.id FROM delivery_queue q
                WHERE {equal("q.webhook_id", "c.webhook_id")} AND q.state <> 'parked'
                    AND q.due_at {due} AND {hidden("q.state")} = 'ready'
                -- OFFSET 0 prevents a join that would use the due time alone.
                LIMIT {most} OFFSET 0
            ) r
        )) AND {hidden("q.state")} = 'ready' AND q.due_at {due}
    """  # noqa: S608 - of constants


# Blocked deliveries are due at infinity, so this condition keeps them out of the scan.
_PARK_WEBHOOKS = park_ready("unnest($1::uuid[]) AS c(webhook_id)", "< 'infinity'")


_PARK_DUE = park_ready("unnest($1::uuid[]) AS c(webhook_id)", "<= now()", most="10000")


_PARK_LEASED = f"""
UPDATE delivery_queue q SET state = 'parked', lease_id = NULL, lease_until = NULL
FROM unnest($1::uuid[], $2::uuid[]) AS t(id, lease_id)
WHERE {equal("q.id", "t.id")} AND q.lease_id = t.lease_id
"""  # noqa: S608 - of constants


#: The head of a statement: `backlogs` are the configs that have one. It is a loose index scan with
#: one probe per config, independent of the length of the backlogs.
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


# Fills the ready part of a config from its backlog once half of it is free, because single
# admissions would cost an index update per settle. Admitted deliveries are due now instead of at
# their old due time, so that they do not overtake other configs. Deliveries of a deleted config are
# admitted too, so that a claim cancels them. A rate limit admits the tokens that ready deliveries
# leave. An open breaker admits nothing; a half-open one admits one delivery at a time.
_ADMIT = f"""
WITH room AS (
    SELECT c.id, c.breaker_open_until IS NULL AS closed, p.slots, p.slots - t.taken AS free,
        CASE WHEN c.rate_limit > 0 THEN floor({TOKENS})::bigint - t.ready END AS tokens
    FROM webhook_configs c JOIN unnest($1::uuid[], $2::int[]) AS a(id, slots)
        ON {equal("c.id", "a.id")}
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.breaker_open_until IS NULL
            THEN least(a.slots, nullif(c.max_in_flight, 0)) ELSE 1 END AS slots
    ) p
    CROSS JOIN LATERAL (
        SELECT count(*) AS taken, count(*) FILTER (WHERE state = 'ready') AS ready FROM (
            SELECT q.state FROM delivery_queue q
            WHERE q.webhook_id = c.id AND q.state <> 'parked' AND q.due_at <= now() LIMIT p.slots
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
    WHERE r.free >= (r.slots + 1) / 2
), locked AS (
    -- Chosen before locked: concurrent engines choose the same rows, so the second finds them
    -- locked and does not admit as many again.
    SELECT id FROM delivery_queue
    WHERE id = ANY (ARRAY(SELECT id FROM chosen)) AND {hidden("state")} = 'parked'
    FOR UPDATE SKIP LOCKED
)
UPDATE delivery_queue q SET state = 'ready', due_at = greatest(q.due_at, now())
FROM locked WHERE {equal("q.id", "locked.id")}
RETURNING q.webhook_id
"""  # noqa: S608 - of constants


async def park_webhooks(connection: Executor, webhook_ids: Sequence[UUID]) -> None:
    """Park the ready deliveries of these configs."""
    await connection.execute(_PARK_WEBHOOKS, webhook_ids)


async def park_due(connection: Executor, webhook_ids: Sequence[UUID]) -> None:
    """Park the due deliveries of these configs, up to 10,000 of each.

    It is for bursts that became due at one time. Parked claim by claim they would delay others.
    """
    await connection.execute(_PARK_DUE, webhook_ids)


async def park_leased(connection: Executor, deliveries: Sequence[LeasedDelivery]) -> None:
    """Park leased deliveries, because their configs cannot take more now."""
    await connection.execute(_PARK_LEASED, *fences(deliveries))


async def webhooks_with_backlog(connection: Executor) -> list[UUID]:
    """Return the configs that have parked deliveries."""
    return [row["webhook_id"] for row in await connection.fetch(_WEBHOOKS_WITH_BACKLOG)]


async def admit(
    connection: Executor, slots: Mapping[UUID, int], most: int | None = None
) -> set[UUID]:
    """Make parked deliveries ready, and return the configs of which some were admitted.

    `slots` is the number of due or leased deliveries that each config may have afterwards. Its own
    concurrency limit, its rate limit and its breaker can reduce it. An inactive config gets none.
    At most `most` deliveries of each config are admitted at a time.
    """
    rows = await connection.fetch(_ADMIT, list(slots), list(slots.values()), most)
    return {row["webhook_id"] for row in rows}
