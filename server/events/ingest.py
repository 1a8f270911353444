"""Stage: accepts events. Has each checked, then stores a batch and fans it out in one statement.

Storing, fan-out and queueing are core/queue.enqueue: a single statement, hence a single commit,
so an accepted event always has its deliveries and their place in the queue.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from time import monotonic, perf_counter
from typing import NamedTuple
from uuid import UUID

import asyncpg

from core import queue
from core.errors import AlreadyExists, FieldViolation, InvalidArgument, PostriderError
from core.ids import new_id
from core.postgres.planner import equal
from core.postgres.pool import met_new_part
from core.postgres.protocols import Pool
from core.queue import BURST_EVENTS, Accepted, NewEvent
from server.event_types.store import EventTypes
from server.events.group_commit import GroupCommit
from server.events.rules import DEFAULT_CONTENT_TYPE, EventDraft, EventRules
from server.metrics import ServerMetrics
from server.notify import Notifier

#: Events of one call that are not put in front of others' single ones; fewer are enough where one
#: merchant has as many in this second.
_LARGE = 100
_LARGE_OF_ONE = 50
#: Events of a call that are checked before it is the turn of others.
_TURN = 25

type _Enqueue = Callable[[Pool, Sequence[NewEvent]], Awaitable[Accepted]]

# Locking the rows makes this a commit of its own, which a synchronous standby has to confirm, and
# with it everything before it: the one that stored the event may have given up waiting for that.
#
# A key may be kept for longer than its event.
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
    """An event that is committed, by this call or (duplicate) by an earlier one with its key."""

    id: UUID
    merchant_id: str
    type: str
    created_at: datetime
    delivery_count: int
    not_before: datetime | None
    ordering_key: str | None
    duplicate: bool


type _Result = PublishedEvent | PostriderError


class Ingest:
    """The way in: drafts go in, committed events or the reasons against them come out."""

    def __init__(
        self,
        pool: Pool,
        event_types: EventTypes,
        notifier: Notifier,
        max_payload_bytes: int,
        metrics: ServerMetrics,
    ):
        self._pool = pool
        self._event_types = event_types
        self._notifier = notifier
        self._rules = EventRules(event_types, max_payload_bytes)
        self._metrics = metrics
        self._bursts = PublishRates()

        async def store(events: Sequence[NewEvent]) -> list[_Result]:
            return await self._store(self._enqueue, events)

        async def store_in_order(events: Sequence[NewEvent]) -> list[_Result]:
            return await self._store(queue.enqueue_in_order, events)

        # Apart, so that only who asks for an order ever waits for one, ...
        self._commits = GroupCommit(store)
        self._commits_in_order = GroupCommit(store_in_order)
        # ... and nobody else for what one merchant floods us with.
        others = (self._commits, self._commits_in_order)
        self._floods = GroupCommit(store, gives_way_to=others)
        self._floods_in_order = GroupCommit(store_in_order, gives_way_to=others)

    async def publish(
        self, drafts: Sequence[EventDraft], path: str, trace_parent: str | None = None
    ) -> Sequence[_Result]:
        """A result for each draft, in order. Accepted ones are durable when this returns.

        `path` names a draft in the errors, with its index for `{}`; `trace_parent` is kept with
        every event, and no part of what its idempotency key stands for.
        """
        types = {draft.type for draft in drafts}
        is_known = self._event_types.are_known(types)
        unknown_types = set() if is_known else await self._event_types.unknown(types)
        events: list[NewEvent] = []
        refused: dict[int, PostriderError] = {}
        for index, draft in enumerate(drafts):
            if violations := self._rules.violations(draft, unknown_types):
                refused[index] = _refusal(path.format(index), violations)
            else:
                events.append(_new_event(draft, trace_parent))
            if index % _TURN == _TURN - 1:
                await asyncio.sleep(0)
        self._metrics.events_rejected += len(refused)
        stored = await self._commits_for(events).store(events) if events else ()
        if not refused:
            return stored
        others = iter(stored)
        return [refused.get(index) or next(others) for index in range(len(drafts))]

    def _commits_for(self, events: Sequence[NewEvent]) -> GroupCommit[_Result]:
        in_order = any(event.ordering_key for event in events)
        busiest = self._bursts.notice([event.merchant_id for event in events])
        large = _LARGE_OF_ONE if busiest > _LARGE_OF_ONE else _LARGE
        if len(events) > large or busiest > FLOOD_EVENTS:
            return self._floods_in_order if in_order else self._floods
        return self._commits_in_order if in_order else self._commits

    async def _enqueue(self, pool: Pool, events: Sequence[NewEvent]) -> Accepted:
        burst = self._bursts.most_of({event.merchant_id for event in events}) > BURST_EVENTS
        return await queue.enqueue(pool, events, burst=burst)

    async def _store(self, enqueue: _Enqueue, events: Sequence[NewEvent]) -> list[_Result]:
        began = perf_counter()
        try:
            accepted = await enqueue(self._pool, events)
        except asyncpg.CheckViolationError as error:
            if not met_new_part(error):
                raise
            accepted = await enqueue(self._pool, events)
        self._metrics.commit.observe(perf_counter() - began)
        self._metrics.commit_events.observe(len(events))
        accepted_at, delivery_counts = accepted
        if any(delivery_counts):
            self._notifier.notify()
        repeated = [
            event for event, count in zip(events, delivery_counts, strict=True) if count is None
        ]
        self._metrics.events_accepted += len(events) - len(repeated)
        before = iter(await self._repeated(enqueue, repeated) if repeated else ())
        return [
            next(before)
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

    async def _repeated(self, enqueue: _Enqueue, events: Sequence[NewEvent]) -> list[_Result]:
        results = await self._published_before(events)
        # A key that was removed just now, by retention or an erasure, stands for nothing any more.
        free = [event for event, result in zip(events, results, strict=True) if result is None]
        anew = iter(await self._store(enqueue, free) if free else ())
        return [next(anew) if result is None else result for result in results]

    async def _published_before(self, events: Sequence[NewEvent]) -> list[_Result | None]:
        """What became of each when its key was first used; None for a key that was not."""
        rows = await self._pool.fetch(
            _PREVIOUS, [e.merchant_id for e in events], [e.idempotency_key for e in events]
        )
        previous = {(row["merchant_id"], row["key"]): row for row in rows}
        results: list[_Result | None] = []
        for event in events:
            row = previous.get((event.merchant_id, event.idempotency_key))
            if row is None:
                results.append(None)
            elif row["content_hash"] != event.content_hash:
                self._metrics.events_rejected += 1
                results.append(
                    AlreadyExists(
                        "this idempotency key was used for another event: use a new key for a new "
                        "event, and the same type, content type, payload, not_before and ordering "
                        "key to repeat one",
                        reason="IDEMPOTENCY_KEY_REUSED",
                    )
                )
            else:
                self._metrics.events_duplicate += 1
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


def _refusal(path: str, violations: Sequence[FieldViolation]) -> InvalidArgument:
    """For a draft that the errors call `path`."""
    return InvalidArgument(*(replace(v, field=f"{path}.{v.field}") for v in violations))


def _new_event(draft: EventDraft, trace_parent: str | None) -> NewEvent:
    content_type = draft.content_type or DEFAULT_CONTENT_TYPE
    payload = draft.payload or b""
    key = draft.idempotency_key or None
    return NewEvent(
        id=new_id(),
        merchant_id=draft.merchant_id,
        type=draft.type,
        content_type=content_type,
        payload=payload,
        idempotency_key=key,
        content_hash=_content_hash(draft, content_type, payload) if key else b"",
        not_before=draft.not_before,
        ordering_key=draft.ordering_key or None,
        trace_parent=trace_parent,
    )


def _content_hash(draft: EventDraft, content_type: str, payload: bytes) -> bytes:
    """SHA-256 of what an idempotency key stands for."""
    content = b"\0".join((draft.type.encode(), content_type.encode(), payload))
    if draft.not_before is not None:
        # Begins as no content without it does, and leaves the hashes of those as they were.
        content = b"\0".join((b"", draft.not_before.isoformat().encode(), content))
    if draft.ordering_key:
        # Begins as nothing above does.
        content = b"\0".join((b"", b"", draft.ordering_key.encode(), content))
    return hashlib.sha256(content).digest()


# Who publishes how much at present (pure).
#
# A crowd is worth a look whether its receivers keep up; a flood must not be in the way of
# others. An
# estimate of one process is enough: to look costs a little, to park is always safe, to wait, too.

#: Events of one merchant in a second, from which on they are a flood.
FLOOD_EVENTS = 500


class PublishRates:
    """Counts each merchant's events of the present second."""

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._second = 0
        self._counts: dict[str, int] = {}

    def notice(self, merchant_ids: Iterable[str]) -> int:
        """Count one event for each of these; how many the busiest of them has in this second."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            # A crowd thins out; it is not gone because a second is.
            self._counts = {m: n // 2 for m, n in self._counts.items() if n > BURST_EVENTS}
        counts, most = self._counts, 0
        for merchant_id in merchant_ids:
            count = counts[merchant_id] = counts.get(merchant_id, 0) + 1
            most = max(most, count)
        return most

    def most_of(self, merchant_ids: Iterable[str]) -> int:
        """How many events the busiest of these merchants has in the present second."""
        return max((self._counts.get(merchant_id, 0) for merchant_id in merchant_ids), default=0)
