"""The rate limits of webhook configs: a token bucket in one column, shared by all engines."""

from collections.abc import Mapping
from uuid import UUID

from core.postgres.planner import equal
from core.postgres.protocols import Executor

#: SQL: the webhooks that the rate of the config c allows now. Unused tokens are kept for a second.
#: `rate_used_until` lies in the future by the time between two statements at most. If it lies
#: further ahead, the database's clock was set back, and the rate counts as unused.
TOKENS = """
    least(c.rate_limit + 1, c.rate_limit * extract(epoch FROM now() - CASE
        WHEN c.rate_used_until < now() + interval '1 minute' THEN c.rate_used_until
    END)::float8)
"""

# Skips a config that another session has locked: its deliveries are parked and ask again.
_SPEND_RATE = f"""
WITH requests AS (
    SELECT c.id, c.rate_limit, a.wanted, {TOKENS} AS tokens
    FROM webhook_configs c JOIN unnest($1::uuid[], $2::int[]) AS a(id, wanted)
        ON {equal("c.id", "a.id")}
    WHERE c.rate_limit > 0
    FOR NO KEY UPDATE OF c SKIP LOCKED
), granted AS (
    SELECT *, greatest(least(floor(tokens), wanted), 0) AS granted FROM requests
)
UPDATE webhook_configs c
SET rate_used_until = now() - (g.tokens - g.granted) / g.rate_limit * interval '1 second'
FROM granted g WHERE {equal("c.id", "g.id")}
RETURNING c.id, g.granted::int, greatest(1 - g.tokens + g.granted, 0) / g.rate_limit AS next_in
"""  # noqa: S608 - of constants


async def spend_rate(
    connection: Executor, wanted: Mapping[UUID, int]
) -> dict[UUID, tuple[int, float]]:
    """Take tokens for webhooks that are sent now.

    Returns the number granted and the seconds until the next token, by config. A config that is
    missing may send nothing at present.
    """
    rows = await connection.fetch(_SPEND_RATE, list(wanted), list(wanted.values()))
    return {row["id"]: (row["granted"], row["next_in"]) for row in rows}
