"""How deep the queue is, for who looks every few seconds: what this costs does not grow with it.

AdminService.GetQueueStatus counts exactly, and reads all there is to count.
"""

from dataclasses import dataclass

from core.lifecycle import DeliveryState
from core.queue.backlog import BACKLOGS
from core.queue.types import Connection

#: So many of a state are counted; what is more is estimated.
COUNTED_MAX = 10_000

# With its statistics from before a flood, the planner would read all of a state and sort it.
_IN_INDEX_ORDER = "SET LOCAL enable_sort = off"

# Each state has an index of its own, whose rows PostgreSQL knows as of the last (auto)vacuum or
# analyze. As the planner does, they are taken to be as dense today. The orders are those of the
# indexes, so that the limit ends the scans.
_DEPTH = """
WITH counted AS (
    SELECT 'ready' AS state, 'delivery_queue_due'::regclass AS index, (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue WHERE state = 'ready' ORDER BY due_at LIMIT $1
        ) ready
    ) AS rows
    UNION ALL
    SELECT 'parked', 'delivery_queue_parked'::regclass, (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue WHERE state = 'parked' ORDER BY webhook_id, id LIMIT $1
        ) parked
    )
    UNION ALL
    SELECT 'leased', 'delivery_queue_lease'::regclass, (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue WHERE state = 'leased' ORDER BY lease_until LIMIT $1
        ) leased
    )
    UNION ALL
    SELECT 'blocked', 'delivery_queue_blocked_of_webhook'::regclass, (
        SELECT count(*) FROM (
            SELECT FROM delivery_queue WHERE state = 'blocked' ORDER BY webhook_id, id LIMIT $1
        ) blocked
    )
)
SELECT t.state, CASE WHEN t.rows < $1 THEN t.rows ELSE greatest(
    t.rows,
    c.reltuples * pg_relation_size(c.oid) / nullif(c.relpages, 0)
        / current_setting('block_size')::float8
) END::bigint AS deliveries
FROM counted t JOIN pg_class c ON c.oid = t.index
"""

# Both ends of an index: the longest due, and the lease that ended first and was not taken back.
_OLDEST_DUE = """
SELECT coalesce(extract(epoch FROM now() - least(
    (
        SELECT due_at FROM delivery_queue
        WHERE state = 'ready' AND due_at <= now() ORDER BY due_at LIMIT 1
    ), (
        SELECT lease_until FROM delivery_queue
        WHERE state = 'leased' AND lease_until <= now() ORDER BY lease_until LIMIT 1
    )
)), 0)::float8
"""

# Who is held has a backlog, once something of it is due; so the backlogs lead to the breakers.
_BREAKERS = f"""
{BACKLOGS}
SELECT count(*) FILTER (WHERE c.breaker_open_until > now()) AS open,
    count(*) FILTER (WHERE c.breaker_open_until <= now()) AS half_open
FROM (SELECT webhook_id FROM backlogs LIMIT $1) b JOIN webhook_configs c ON c.id = b.webhook_id
"""  # noqa: S608 - of constants


@dataclass(frozen=True, slots=True)
class Depth:
    """Open deliveries by state, and how long the oldest has waited for nothing but an engine."""

    deliveries: dict[DeliveryState, int]
    oldest_due_age_seconds: float
    #: Of the webhook configs that have a backlog, those with such a breaker.
    open_breakers: int
    half_open_breakers: int


async def measure_depth(connection: Connection) -> Depth:
    """Read in a transaction of its own, on a connection rather than a pool.

    Of a state more than COUNTED_MAX are estimated, as at least that many; of configs not more than
    that many are looked at.
    """
    async with connection.transaction(readonly=True):
        await connection.execute(_IN_INDEX_ORDER)
        rows = await connection.fetch(_DEPTH, COUNTED_MAX)
        age = await connection.fetchval(_OLDEST_DUE)
        breakers = await connection.fetchrow(_BREAKERS, COUNTED_MAX)
    return Depth(
        {DeliveryState(row["state"]): row["deliveries"] for row in rows},
        age,
        breakers["open"],
        breakers["half_open"],
    )
