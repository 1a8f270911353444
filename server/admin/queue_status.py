"""Counts open deliveries, exactly, in one statement and hence of one moment.

Backlogs and what is blocked, which is what grows, are counted by their indexes alone; the rest is
as large as what engines have yet to look at. A million rows take about half a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from core.errors import InvalidArgument
from server.database import Sessions

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
    SELECT * FROM open ORDER BY ready + parked + leased + blocked DESC, webhook_id LIMIT :top
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
_OF_ONE = _STATUS.format(of_webhook=" AND webhook_id = :webhook_id")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a part of the queue stands; `webhook_id` is None for all of it together."""

    webhook_id: UUID | None
    merchant_id: str | None
    ready: int
    parked: int
    leased: int
    blocked: int
    oldest_due_age_seconds: float
    breaker_open_until: datetime | None


async def queue_status(
    sessions: Sessions, webhook_id: UUID | None, top: int
) -> tuple[Standing, Sequence[Standing]]:
    """All together, and the configs with the most open deliveries; or both for one config."""
    if top < 0:
        raise InvalidArgument.of(
            "top", f"must be 0 (meaning {_TOP_DEFAULT}) to {_TOP_MAX}", reason="TOP_INVALID"
        )
    arguments: dict[str, object] = {"top": min(top or _TOP_DEFAULT, _TOP_MAX)}
    if webhook_id is not None:
        arguments["webhook_id"] = webhook_id
    statement = text(_OF_ALL if webhook_id is None else _OF_ONE)
    async with sessions() as session:
        rows = (await session.execute(statement, arguments)).mappings().all()
    total, *webhooks = (Standing(**row) for row in rows)
    return total, webhooks
