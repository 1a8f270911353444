"""Circuit breakers: a config that keeps failing gets no requests for a while.

`breaker_open_until` is null while the breaker is closed. Before that time the breaker is open and
admits nothing. After it the breaker is half-open and admits one delivery at a time. The column is
written only on transitions.
"""

from collections.abc import Collection, Iterable
from uuid import UUID

from core.postgres.planner import equal
from core.postgres.protocols import Executor
from core.queue.backlog import park_ready
from core.queue.types import BreakerChange

# A trip counts only in the state that the engine's claim saw. So several engines open a breaker
# once, and an attempt from before a probe does not lengthen the wait. A pause that the receiver
# requested counts in any state, but not for a config that changed since: it may have another
# receiver. Retries stay ready and are parked when they are due.
_OPEN = f"""
WITH wanted AS (
    SELECT c.id, t.trips, greatest(
        w.asked, CASE WHEN t.trips THEN least($5 * 2 ^ least(c.breaker_trips, 30), $6) ELSE 0 END
    ) AS seconds
    FROM webhook_configs c
    JOIN unnest($1::uuid[], $2::timestamptz[], $3::bool[], $4::float8[], $7::int[])
        AS w(id, seen, trips, asked, version) ON {equal("c.id", "w.id")}
    CROSS JOIN LATERAL (
        SELECT w.trips AND c.breaker_open_until IS NOT DISTINCT FROM w.seen AS trips
    ) t
    WHERE coalesce(w.version >= c.version, true)
    ORDER BY c.id
    FOR NO KEY UPDATE OF c
), opened AS (
    UPDATE webhook_configs c
    SET breaker_open_until = now() + w.seconds * interval '1 second',
        breaker_trips = c.breaker_trips + w.trips::int
    FROM wanted w
    WHERE {equal("c.id", "w.id")}
        AND now() + w.seconds * interval '1 second' > coalesce(c.breaker_open_until, now())
    RETURNING c.id, w.seconds
), parked AS (
    {park_ready("opened AS c(webhook_id)", "<= now()")}
)
SELECT id, seconds FROM opened
"""  # noqa: S608 - of constants


_CLOSE = """
UPDATE webhook_configs c SET breaker_open_until = NULL, breaker_trips = 0
FROM (
    SELECT id FROM webhook_configs WHERE id = ANY ($1) AND breaker_open_until IS NOT NULL
    ORDER BY id
    FOR NO KEY UPDATE
) half_open
WHERE c.id = half_open.id
RETURNING c.id
"""


async def open_breakers(
    connection: Executor,
    changes: Iterable[BreakerChange],
    cooldown_seconds: float,
    cooldown_max_seconds: float,
) -> dict[UUID, float]:
    """Open breakers, park the due deliveries, and return the pause in seconds by config.

    The cool-down doubles with every trip until the breaker closes. Pass at most one change per
    config. A change that came too late is missing from the result.
    """
    changes = list(changes)
    rows = await connection.fetch(
        _OPEN,
        [c.webhook_id for c in changes],
        [c.seen for c in changes],
        [c.trips for c in changes],
        [c.requested_pause_seconds for c in changes],
        cooldown_seconds,
        cooldown_max_seconds,
        [c.version for c in changes],
    )
    return {row["id"]: row["seconds"] for row in rows}


async def close_breakers(connection: Executor, webhook_ids: Collection[UUID]) -> set[UUID]:
    """Close the breakers of these configs, and return those that were not closed."""
    return {row["id"] for row in await connection.fetch(_CLOSE, list(webhook_ids))}
