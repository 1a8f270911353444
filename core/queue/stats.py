"""Sizes of the queue for metrics, at a cost that does not grow with the queue.

AdminService.GetQueueStatus counts exactly, and reads every row that it counts.
"""

from dataclasses import dataclass

from core.lifecycle import DeliveryState
from core.postgres.protocols import Connection
from core.queue.backlog import BACKLOGS

#: Deliveries of one state that are counted. Beyond that the number is an estimate.
COUNTED_MAX = 10_000

# With outdated statistics the planner would read and sort all deliveries of a state.
_IN_INDEX_ORDER = "SET LOCAL enable_sort = off"

# Each state has its own index. PostgreSQL knows the rows per page as of the last vacuum or analyze,
# and this estimate assumes the same density, as the planner does. Each ORDER BY is the order of the
# index, so that the limit ends the scan.
_DELIVERIES = """
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

# The longest due delivery, and the lease that expired first and was not reclaimed.
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

# A config with an open breaker has a backlog once one of its deliveries is due.
_BREAKERS = f"""
{BACKLOGS}
SELECT count(*) FILTER (WHERE c.breaker_open_until > now()) AS open,
    count(*) FILTER (WHERE c.breaker_open_until <= now()) AS half_open
FROM (SELECT webhook_id FROM backlogs LIMIT $1) b JOIN webhook_configs c ON c.id = b.webhook_id
"""  # noqa: S608 - of constants


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Open deliveries by state, and the age of the oldest delivery that only needs an engine."""

    deliveries: dict[DeliveryState, int]
    oldest_due_age_seconds: float
    #: Breakers of the webhook configs that have a backlog.
    open_breakers: int
    half_open_breakers: int


async def read_queue_stats(connection: Connection) -> QueueStats:
    """Read the sizes in a separate transaction.

    More than COUNTED_MAX deliveries of a state are estimated. At most COUNTED_MAX configs are read.
    """
    async with connection.transaction(readonly=True):
        await connection.execute(_IN_INDEX_ORDER)
        rows = await connection.fetch(_DELIVERIES, COUNTED_MAX)
        age = await connection.fetchval(_OLDEST_DUE)
        breakers = await connection.fetchrow(_BREAKERS, COUNTED_MAX)
    return QueueStats(
        {DeliveryState(row["state"]): row["deliveries"] for row in rows},
        age,
        breakers["open"],
        breakers["half_open"],
    )
