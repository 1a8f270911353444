"""Reads and writes events. Reads return no payloads, and are limited to a merchant or an id."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import perf_counter
from typing import NamedTuple
from uuid import UUID

import asyncpg

from core import queue
from core.errors import AlreadyExists, PostriderError
from core.ids import first_id_at
from core.postgres.planner import equal
from core.postgres.pool import met_new_partition
from core.postgres.protocols import Executor, Pool
from core.queue import BURST_EVENTS, Accepted, NewEvent
from server.events.publish_rates import PublishRates
from server.metrics import ServerMetrics
from server.notify import Notifier

_ID_MAX = UUID(int=(1 << 128) - 1)
#: Upper bound between the time in an id (the server's clock, before the commit) and `created_at`
#: (the database's clock, at the commit).
_SKEW = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class EventRow:
    """An accepted event."""

    id: UUID
    merchant_id: str
    type: str
    created_at: datetime
    delivery_count: int
    not_before: datetime | None
    ordering_key: str | None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events to list. None does not filter. `before` is the last id of the previous page."""

    type: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    before: UUID | None = None


_COLUMNS = "id, merchant_id, type, created_at, delivery_count, not_before, ordering_key"
_ONE = f"SELECT {_COLUMNS} FROM events WHERE id = $1"  # noqa: S608 - of constants
# The ids limit the partitions and the part of the index that is read. The times are exact.
_LIST = (
    f"SELECT {_COLUMNS} FROM events "  # noqa: S608 - of constants
    "WHERE merchant_id = $1 AND id >= $2 AND id < $3{filters} ORDER BY id DESC LIMIT $4"
)


async def find_event(pool: Executor, merchant_id: str | None, event_id: UUID) -> EventRow | None:
    """Return an event, or None if it is another merchant's. Pass None for all merchants."""
    row = await pool.fetchrow(_ONE, event_id)
    if row is None or merchant_id not in (None, row["merchant_id"]):
        return None
    return EventRow(**row)


async def list_events(
    pool: Executor, merchant_id: str, wanted: EventFilter, limit: int
) -> list[EventRow]:
    """Return at most `limit` events of a merchant, newest first."""
    statement, arguments = _page(merchant_id, wanted, limit)
    return [EventRow(**row) for row in await pool.fetch(statement, *arguments)]


def _page(merchant_id: str, wanted: EventFilter, limit: int) -> tuple[str, list[object]]:
    lowest = first_id_at(wanted.start, -_SKEW) if wanted.start else UUID(int=0)
    highest = first_id_at(wanted.end, _SKEW) if wanted.end else _ID_MAX
    if wanted.before is not None:
        highest = min(highest, wanted.before)
    arguments: list[object] = [merchant_id, lowest, highest, limit]
    filters = ""
    for condition, value in (
        ("type =", wanted.type),
        ("created_at >=", wanted.start),
        ("created_at <", wanted.end),
    ):
        if value is not None:
            arguments.append(value)
            filters += f" AND {condition} ${len(arguments)}"
    return _LIST.format(filters=filters), arguments


# The row locks make this a separate commit, which a synchronous standby confirms together with all
# earlier commits. The call that stored the event may have given up waiting for that confirmation.
# A key may be kept longer than its event.
_PREVIOUS = f"""
SELECT k.merchant_id, k.key, k.content_hash, k.event_id,
    coalesce(e.created_at, k.created_at) AS created_at,
    coalesce(e.delivery_count, 0) AS delivery_count
FROM unnest($1::text[], $2::text[]) AS t(merchant_id, key)
JOIN idempotency_keys k
    ON {equal("k.merchant_id", "t.merchant_id")} AND {equal("k.key", "t.key")}
LEFT JOIN events e ON {equal("e.id", "k.event_id")}
FOR KEY SHARE OF k
"""  # noqa: S608 - of constants


class PublishedEvent(NamedTuple):
    """A committed event. A duplicate was committed by an earlier call with the same key."""

    id: UUID
    merchant_id: str
    type: str
    created_at: datetime
    delivery_count: int
    not_before: datetime | None
    ordering_key: str | None
    duplicate: bool


type PublishResult = PublishedEvent | PostriderError


class EventWriter:
    """Commits batches of events with their deliveries, and looks up repeated idempotency keys.

    `in_order` is for events of which some have an ordering key.
    """

    def __init__(
        self,
        pool: Pool,
        notifier: Notifier,
        metrics: ServerMetrics,
        rates: PublishRates,
        *,
        in_order: bool,
    ):
        self._pool = pool
        self._notifier = notifier
        self._metrics = metrics
        self._rates = rates
        self._in_order = in_order

    async def commit(self, events: Sequence[NewEvent]) -> list[PublishResult]:
        """Return a result for each event, in order. Accepted events are committed."""
        started = perf_counter()
        try:
            accepted = await self._enqueue(events)
        except asyncpg.CheckViolationError as error:
            if not met_new_partition(error):
                raise
            accepted = await self._enqueue(events)
        self._metrics.commit.observe(perf_counter() - started)
        self._metrics.commit_events.observe(len(events))
        accepted_at, delivery_counts = accepted
        if any(delivery_counts):
            self._notifier.notify()
        repeated = [
            event for event, count in zip(events, delivery_counts, strict=True) if count is None
        ]
        self._metrics.events_accepted.inc(len(events) - len(repeated))
        earlier = iter(await self._commit_repeated(repeated) if repeated else ())
        return [
            next(earlier)
            if count is None
            else PublishedEvent(
                event.id,
                event.merchant_id,
                event.type,
                accepted_at,
                count,
                event.not_before,
                event.ordering_key,
                duplicate=False,
            )
            for event, count in zip(events, delivery_counts, strict=True)
        ]

    async def _enqueue(self, events: Sequence[NewEvent]) -> Accepted:
        if self._in_order:
            return await queue.enqueue_in_order(self._pool, events)
        burst = self._rates.highest({event.merchant_id for event in events}) > BURST_EVENTS
        return await queue.enqueue(self._pool, events, burst=burst)

    async def _commit_repeated(self, events: Sequence[NewEvent]) -> list[PublishResult]:
        results = await self._find_previous(events)
        # Retention or an erasure may have removed a key in between, so that it is free again.
        free = [event for event, result in zip(events, results, strict=True) if result is None]
        committed = iter(await self.commit(free) if free else ())
        return [next(committed) if result is None else result for result in results]

    async def _find_previous(self, events: Sequence[NewEvent]) -> list[PublishResult | None]:
        """Return the result of the first use of each key, or None for an unused key."""
        rows = await self._pool.fetch(
            _PREVIOUS, [e.merchant_id for e in events], [e.idempotency_key for e in events]
        )
        previous = {(row["merchant_id"], row["key"]): row for row in rows}
        results: list[PublishResult | None] = []
        for event in events:
            row = previous.get((event.merchant_id, event.idempotency_key))
            if row is None:
                results.append(None)
            elif row["content_hash"] != event.content_hash:
                self._metrics.events_rejected.inc()
                results.append(_key_reused())
            else:
                self._metrics.events_duplicate.inc()
                results.append(
                    PublishedEvent(
                        id=row["event_id"],
                        merchant_id=event.merchant_id,
                        type=event.type,
                        created_at=row["created_at"],
                        delivery_count=row["delivery_count"],
                        not_before=event.not_before,
                        ordering_key=event.ordering_key,
                        duplicate=True,
                    )
                )
        return results


def _key_reused() -> AlreadyExists:
    return AlreadyExists(
        "this idempotency key was used for another event: use a new key for a new event, and the "
        "same type, content type, payload, not_before and ordering key to repeat one",
        reason="IDEMPOTENCY_KEY_REUSED",
    )
