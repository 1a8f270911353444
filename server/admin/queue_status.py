"""Counts open deliveries exactly, in one statement and so at one moment.

Parked and blocked deliveries, which can be many, are counted by index-only scans. A million rows
take about half a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from core.errors import InvalidArgument
from core.postgres.protocols import Executor

_TOP_DEFAULT = 20
_TOP_MAX = 100

_STATUS = """
WITH parked AS (
    SELECT webhook_id, count(*) AS parked FROM delivery_queue
    WHERE state = 'parked'{of_webhook} GROUP BY webhook_id
), blocked AS (
    SELECT webhook_id, count(*) AS blocked FROM delivery_queue
    WHERE state = 'blocked'{of_webhook} GROUP BY webhook_id
), others AS (
    SELECT webhook_id, count(*) FILTER (WHERE state = 'ready') AS ready,
        count(*) FILTER (WHERE state = 'leased') AS leased,
        min(due_at) FILTER (WHERE state = 'ready' AND due_at <= now()) AS oldest_due_at
    FROM delivery_queue
    WHERE state <> 'parked' AND due_at < 'infinity'{of_webhook} GROUP BY webhook_id
), open AS (
    SELECT webhook_id, coalesce(ready, 0) AS ready, coalesce(parked, 0) AS parked,
        coalesce(leased, 0) AS leased, coalesce(blocked, 0) AS blocked, oldest_due_at
    FROM parked FULL JOIN others USING (webhook_id) FULL JOIN blocked USING (webhook_id)
), top AS (
    SELECT * FROM open ORDER BY ready + parked + leased + blocked DESC, webhook_id LIMIT $1
)
SELECT NULL::uuid AS webhook_id, NULL AS merchant_id, coalesce(sum(ready), 0)::bigint AS ready,
    coalesce(sum(parked), 0)::bigint AS parked, coalesce(sum(leased), 0)::bigint AS leased,
    coalesce(sum(blocked), 0)::bigint AS blocked,
    coalesce(extract(epoch FROM now() - min(oldest_due_at)), 0)::float8 AS oldest_due_age_seconds,
    NULL::timestamptz AS breaker_open_until
FROM open
UNION ALL (
    SELECT t.webhook_id, c.merchant_id, t.ready, t.parked, t.leased, t.blocked,
        coalesce(extract(epoch FROM now() - t.oldest_due_at), 0)::float8, c.breaker_open_until
    FROM top t LEFT JOIN webhook_configs c ON c.id = t.webhook_id
    ORDER BY t.ready + t.parked + t.leased + t.blocked DESC, t.webhook_id
)
"""
_OF_ALL = _STATUS.format(of_webhook="")
_OF_ONE = _STATUS.format(of_webhook=" AND webhook_id = $2")


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Open deliveries of one config, or of all configs if `webhook_id` is None."""

    webhook_id: UUID | None
    merchant_id: str | None
    ready: int
    parked: int
    leased: int
    blocked: int
    oldest_due_age_seconds: float
    breaker_open_until: datetime | None


async def queue_status(
    database: Executor, webhook_id: UUID | None, top: int
) -> tuple[QueueStatus, Sequence[QueueStatus]]:
    """Return the total and the configs with the most open deliveries, or both for one config."""
    if top < 0:
        raise InvalidArgument.of(
            "top", f"must be 0 (meaning {_TOP_DEFAULT}) to {_TOP_MAX}", reason="TOP_INVALID"
        )
    limit = min(top or _TOP_DEFAULT, _TOP_MAX)
    if webhook_id is None:
        rows = await database.fetch(_OF_ALL, limit)
    else:
        rows = await database.fetch(_OF_ONE, limit, webhook_id)
    total, *webhooks = (QueueStatus(**row) for row in rows)
    return total, webhooks
