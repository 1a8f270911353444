"""Stage: accepts events. Checks each one, and hands the valid ones to a group commit.

The group commit stores them through `EventWriter` in one statement with their deliveries, so an
accepted event always has its deliveries in the queue.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace

from core.errors import FieldViolation, InvalidArgument, PostriderError
from core.ids import new_id
from core.postgres.protocols import Pool
from core.queue import NewEvent
from server.event_types.store import EventTypes
from server.events.group_commit import GroupCommit
from server.events.publish_rates import FLOOD_EVENTS, PublishRates
from server.events.rules import DEFAULT_CONTENT_TYPE, EventDraft, EventRules
from server.events.store import EventWriter, PublishResult
from server.metrics import ServerMetrics
from server.notify import Notifier

#: A call with more events than this does not share a commit with single events. The second limit
#: applies to a merchant that has as many events in this second.
_LARGE_CALL = 100
_LARGE_CALL_OF_BUSY_MERCHANT = 50
#: Events that are checked before other calls get a turn of the event loop.
_CHECKS_PER_TURN = 25


class Ingest:
    """Turns drafts into committed events, or into the reasons against them."""

    def __init__(
        self,
        pool: Pool,
        event_types: EventTypes,
        notifier: Notifier,
        max_payload_bytes: int,
        metrics: ServerMetrics,
    ):
        self._event_types = event_types
        self._rules = EventRules(event_types, max_payload_bytes)
        self._metrics = metrics
        self._rates = PublishRates()
        writer, ordered_writer = (
            EventWriter(pool, notifier, metrics, self._rates, in_order=in_order)
            for in_order in (False, True)
        )
        # Separate, so that only events with an ordering key wait for the locks of keys.
        self._commits = GroupCommit(writer)
        self._ordered_commits = GroupCommit(ordered_writer)
        # Separate, so that other merchants do not wait for a flood.
        others = (self._commits, self._ordered_commits)
        self._floods = GroupCommit(writer, gives_way_to=others)
        self._ordered_floods = GroupCommit(ordered_writer, gives_way_to=others)

    async def publish(
        self, drafts: Sequence[EventDraft], path: str, trace_parent: str | None = None
    ) -> Sequence[PublishResult]:
        """Return a result for each draft, in order. Accepted events are then durable.

        `path` names a draft in errors, with its index for `{}`. `trace_parent` is stored with every
        event, and is not part of the content that an idempotency key stands for.
        """
        types = {draft.type for draft in drafts}
        is_known = self._event_types.are_known(types)
        unknown_types = set() if is_known else await self._event_types.unknown(types)
        events: list[NewEvent] = []
        refused: dict[int, PostriderError] = {}
        for index, draft in enumerate(drafts):
            if violations := self._rules.violations(draft, unknown_types):
                refused[index] = _invalid(path.format(index), violations)
            else:
                events.append(_new_event(draft, trace_parent))
            if index % _CHECKS_PER_TURN == _CHECKS_PER_TURN - 1:
                await asyncio.sleep(0)
        self._metrics.events_rejected.inc(len(refused))
        stored = await self._commits_for(events).submit(events) if events else ()
        if not refused:
            return stored
        accepted = iter(stored)
        return [refused.get(index) or next(accepted) for index in range(len(drafts))]

    def _commits_for(self, events: Sequence[NewEvent]) -> GroupCommit[PublishResult]:
        in_order = any(event.ordering_key for event in events)
        highest = self._rates.count([event.merchant_id for event in events])
        is_busy = highest > _LARGE_CALL_OF_BUSY_MERCHANT
        large = _LARGE_CALL_OF_BUSY_MERCHANT if is_busy else _LARGE_CALL
        if len(events) > large or highest > FLOOD_EVENTS:
            return self._ordered_floods if in_order else self._floods
        return self._ordered_commits if in_order else self._commits


def _invalid(path: str, violations: Sequence[FieldViolation]) -> InvalidArgument:
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
    """Return the SHA-256 of the content that an idempotency key stands for."""
    content = b"\0".join((draft.type.encode(), content_type.encode(), payload))
    if draft.not_before is not None:
        # A type is not empty, so this prefix cannot collide. Other hashes stay the same.
        content = b"\0".join((b"", draft.not_before.isoformat().encode(), content))
    if draft.ordering_key:
        # A time is not empty, so this prefix cannot collide with the one above.
        content = b"\0".join((b"", b"", draft.ordering_key.encode(), content))
    return hashlib.sha256(content).digest()
