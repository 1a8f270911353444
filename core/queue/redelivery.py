"""Redeliveries: new deliveries for finished ones, singly or for all failed ones of a time range."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from core.ids import first_id_at
from core.lifecycle import Outcome
from core.postgres.planner import equal, hidden
from core.postgres.protocols import Executor
from core.queue.enqueue import HAS_BACKLOG, STATE_IN_BURST

# Joined with the event, because a delivery without one could be claimed and never sent.
_REDELIVER = f"""
INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, redelivery_of)
SELECT new_uuid7(), f.webhook_id, f.event_id, f.merchant_id, f.event_type,
    CASE WHEN w.active AND w.breaker_open_until IS NULL AND NOT {HAS_BACKLOG} THEN 'ready'
        ELSE 'parked' END, f.id
FROM finished_deliveries f
JOIN webhook_configs w ON {equal("w.id", "f.webhook_id")} AND w.deleted_at IS NULL
JOIN events e ON {equal("e.id", "f.event_id")}
WHERE f.id = $2 AND f.merchant_id = $1
-- Retention waits for this lock before it removes the delivery, and then keeps the event.
FOR KEY SHARE OF f
RETURNING id
"""  # noqa: S608 - of constants


# Reads a page of undelivered deliveries in the order of the index, before the filters, so that
# every page is short. If several deliveries of one event to one config failed, only the newest
# counts. A failed redelivery does not prevent another one.
_CLASSIFY = f"""
WITH page AS (
    SELECT f.id, f.state, f.webhook_id, f.event_id, f.merchant_id, f.event_type, f.attempt_count
    FROM finished_deliveries f
    WHERE f.state <> 'delivered' AND f.id >= $1 AND f.id < $2
        AND (f.merchant_id, f.id) > ($3, $4){{of_merchant}}
    ORDER BY f.merchant_id, f.id LIMIT $5 {{lock}}
), failed AS (
    SELECT p.*, row_number() OVER (PARTITION BY webhook_id, event_id ORDER BY id DESC) AS age
    FROM page p
    WHERE p.state = 'failed' AND ($6::uuid IS NULL OR p.webhook_id = $6)
        AND ($7::text[] IS NULL OR (
            SELECT a.outcome = ANY ($7) FROM attempts a
            WHERE a.delivery_id = p.id AND a.number = p.attempt_count LIMIT 1
        ))
), classified AS (
    SELECT f.*, w.active, w.breaker_open_until IS NULL AS closed, CASE
        WHEN w.id IS NULL OR (
            SELECT true FROM events e WHERE e.id = f.event_id LIMIT 1
        ) IS NULL THEN 'skipped'
        WHEN f.age > 1 OR (
            SELECT true FROM delivery_queue q
            WHERE q.event_id = f.event_id AND q.webhook_id = f.webhook_id
                AND q.redelivery_of IS NOT NULL LIMIT 1
        ) OR (
            SELECT true FROM finished_deliveries r
            WHERE {equal("r.event_id", "f.event_id")} AND {hidden("r.webhook_id")} = f.webhook_id
                AND r.id > f.id AND r.id > $1 AND r.state = 'delivered'
            -- The order selects the index by event. The ids select the partitions.
            ORDER BY r.event_id LIMIT 1
        ) THEN 'repeated'
        ELSE 'wanted' END AS class
    FROM failed f
    LEFT JOIN webhook_configs w ON {equal("w.id", "f.webhook_id")} AND w.deleted_at IS NULL
){{made}}
SELECT t.*, l.merchant_id, l.id
FROM (
    SELECT count(*) FILTER (WHERE class = 'wanted') AS redelivered,
        count(*) FILTER (WHERE class = 'repeated') AS already_redelivered,
        count(*) FILTER (WHERE class = 'skipped') AS skipped
    FROM classified
) t
-- The end of the page, unless it is the last one.
LEFT JOIN (
    SELECT merchant_id, id FROM page ORDER BY merchant_id, id OFFSET $5 - 1 LIMIT 1
) l ON true
"""  # noqa: S608 - of constants
_MAKE = f""", wanted AS (
    SELECT webhook_id AS id, id AS delivery_id, event_id, merchant_id, event_type, active, closed,
        false AS later, row_number() OVER (PARTITION BY webhook_id ORDER BY id) AS rank
    FROM classified WHERE class = 'wanted'
), made AS (
    INSERT INTO delivery_queue
        (id, webhook_id, event_id, merchant_id, event_type, state, redelivery_of)
    SELECT new_uuid7(), w.id, w.event_id, w.merchant_id, w.event_type, {STATE_IN_BURST},
        w.delivery_id
    FROM wanted w
)"""  # noqa: S608 - of constants


class RedeliveryPosition(NamedTuple):
    """The end of a page of failed deliveries, which are read merchant by merchant."""

    merchant_id: str
    delivery_id: UUID


#: The position before the first delivery.
BEGINNING = RedeliveryPosition("", UUID(int=0))


@dataclass(frozen=True, slots=True)
class FailedFilter:
    """The failed deliveries to select. None and () do not filter.

    They were created in [start_at, end_at), in milliseconds. `outcomes` are those of the last
    attempt.
    """

    start_at: datetime
    end_at: datetime
    merchant_id: str | None = None
    webhook_id: UUID | None = None
    outcomes: Sequence[Outcome] = ()


@dataclass(frozen=True, slots=True)
class RedeliveredPage:
    """The numbers of one page.

    Deliveries without a webhook config or an event are skipped. `end` is None after the last page.
    """

    redelivered: int
    already_redelivered: int
    skipped: int
    end: RedeliveryPosition | None


async def redeliver(connection: Executor, merchant_id: str, delivery_id: UUID) -> UUID | None:
    """Create a new delivery of a finished one's event, with a new retry schedule.

    Returns None if the merchant has no such finished delivery, its config is deleted, or its event
    is no longer stored.
    """
    made: UUID | None = await connection.fetchval(_REDELIVER, merchant_id, delivery_id)
    return made


async def redeliver_failed(
    connection: Executor,
    wanted: FailedFilter,
    after: RedeliveryPosition,
    limit: int,
    *,
    dry_run: bool = False,
) -> RedeliveredPage:
    """Create a delivery for each failed one of a page, unless a later one is open or delivered.

    Reads at most `limit` undelivered deliveries after the position. A dry run only counts. Do not
    run two of these concurrently, because both would create the same deliveries.
    """
    of_merchant = "" if wanted.merchant_id is None else " AND f.merchant_id = $8"
    lock, made = ("", "") if dry_run else ("FOR KEY SHARE OF f", _MAKE)
    statement = _CLASSIFY.format(of_merchant=of_merchant, lock=lock, made=made)
    row = await connection.fetchrow(statement, *_arguments(wanted, after, limit))
    return RedeliveredPage(
        row["redelivered"],
        row["already_redelivered"],
        row["skipped"],
        RedeliveryPosition(row["merchant_id"], row["id"]) if row["id"] else None,
    )


def _arguments(wanted: FailedFilter, after: RedeliveryPosition, limit: int) -> list[object]:
    of_merchant = [] if wanted.merchant_id is None else [wanted.merchant_id]
    return [
        first_id_at(wanted.start_at),
        first_id_at(wanted.end_at),
        *after,
        limit,
        wanted.webhook_id,
        list(wanted.outcomes) or None,
        *of_merchant,
    ]
