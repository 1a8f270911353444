"""EventService: publishes events through `ingest`, and reads them through `store`."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, nullcontext
from typing import Any
from uuid import UUID

import grpc

from core.errors import (
    InvalidArgument,
    PostriderError,
    Unauthenticated,
    Unavailable,
)
from core.postgres.protocols import Pool
from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc
from server.auth.principal import Principal, Scope
from server.auth.rate_limits import StreamSlots
from server.event_types.rules import event_type_filter
from server.events.convert import event_draft, event_message, fill_event
from server.events.ingest import Ingest
from server.events.ordered_commits import OrderedCommits, Turns
from server.events.rules import EventDraft
from server.events.store import EventFilter, PublishResult, find_event, list_events
from server.rpc.authenticate import principal
from server.rpc.call import current_call
from server.rpc.ids import check_merchant_id, id_of, not_found
from server.rpc.pagination import page_size, page_token, parse_page_token
from server.rpc.times import time_range

type Context = grpc.aio.ServicerContext[Any, Any]
pb = event_service_pb2

BATCH_MAX = 1000
UNACKNOWLEDGED_BATCHES_MAX = 16


class EventService(event_service_pb2_grpc.EventServiceServicer):
    """Responses are sent after the commit."""

    def __init__(self, ingest: Ingest, pool: Pool, stream_slots: StreamSlots):
        self._ingest = ingest
        self._pool = pool
        self._stream_slots = stream_slots
        self._streams: set[OrderedCommits[pb.StreamEventsRequest, pb.StreamEventsResponse]] = set()
        self._draining = False

    def drain(self) -> None:
        """End every stream once its accepted batches are acknowledged."""
        self._draining = True
        for stream in self._streams:
            stream.end(_stopping())

    async def PublishEvent(
        self, request: pb.PublishEventRequest, context: Context
    ) -> pb.PublishEventResponse:
        caller = _publisher()
        caller.require_merchant(request.event.merchant_id)
        drafts = [event_draft(request.event)]
        [result] = await self._ingest.publish(drafts, "event", _trace_parent())
        if isinstance(result, PostriderError):
            raise result
        response = pb.PublishEventResponse(duplicate=result.duplicate)
        fill_event(response.event, result)
        return response

    async def PublishEvents(
        self, request: pb.PublishEventsRequest, context: Context
    ) -> pb.PublishEventsResponse:
        drafts = _drafts(_publisher(), request.events)
        results = await self._ingest.publish(drafts, "events[{}]", _trace_parent())
        return pb.PublishEventsResponse(results=[_result(result) for result in results])

    async def StreamEvents(
        self, request_iterator: AsyncIterator[pb.StreamEventsRequest], context: Context
    ) -> AsyncIterator[pb.StreamEventsResponse]:
        caller = _publisher()
        last: int | None = None
        turns = Turns()

        def commit(
            request: pb.StreamEventsRequest,
        ) -> Coroutine[Any, Any, pb.StreamEventsResponse]:
            nonlocal last
            if last is not None and request.sequence <= last:
                raise _not_ascending(request.sequence, last)
            last = request.sequence
            return self._commit(request.sequence, _drafts(caller, request.events), turns)

        slots = self._stream_slots
        place = slots.slot(caller.merchant_id) if caller.merchant_id else nullcontext()
        stream = OrderedCommits(commit, UNACKNOWLEDGED_BATCHES_MAX)
        expiry = asyncio.get_running_loop().call_later(
            caller.expires_at - time.time(), stream.end, _expired()
        )
        self._streams.add(stream)
        if self._draining:
            stream.end(_stopping())
        try:
            with place:
                async with aclosing(stream.acknowledge(request_iterator)) as responses:
                    async for response in responses:
                        yield response
        finally:
            expiry.cancel()
            self._streams.discard(stream)

    async def GetEvent(self, request: pb.GetEventRequest, context: Context) -> pb.GetEventResponse:
        caller = _publisher()
        event_id = id_of("evt", request.id)
        row = await find_event(self._pool, caller.merchant_id, event_id)
        if row is None:
            raise not_found("evt", request.id)
        return pb.GetEventResponse(event=event_message(row))

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Context
    ) -> pb.ListEventsResponse:
        caller = _publisher()
        merchant_id = request.merchant_id or caller.merchant_id or ""
        check_merchant_id(merchant_id)
        event_type = event_type_filter(request.type, "type")
        size = page_size(request.page_size, default=50, maximum=100)
        start, end = time_range(request)
        identity = ("events", merchant_id, request.type, start, end)
        before = parse_page_token(request.page_token, UUID, *identity)
        if caller.merchant_id not in (None, merchant_id):
            # The same response as for a merchant without events.
            return pb.ListEventsResponse()
        wanted = EventFilter(event_type, start, end, before)
        rows = await list_events(self._pool, merchant_id, wanted, size + 1)
        return pb.ListEventsResponse(
            events=[event_message(row) for row in rows[:size]],
            next_page_token=page_token(rows[size - 1].id.hex, *identity)
            if len(rows) > size
            else "",
        )

    async def _commit(
        self, sequence: int, drafts: Sequence[EventDraft], turns: Turns
    ) -> pb.StreamEventsResponse:
        in_order = any(draft.ordering_key for draft in drafts)
        async with turns.turn() if in_order else nullcontext():
            results = await self._ingest.publish(drafts, "events[{}]", _trace_parent())
        return pb.StreamEventsResponse(
            sequence=sequence, results=[_result(result) for result in results]
        )


def _publisher() -> Principal:
    caller = principal()
    caller.require(Scope.PUBLISH)
    return caller


def _trace_parent() -> str | None:
    """Return the traceparent to store with the events of this call."""
    trace_parent = current_call().trace_parent
    return str(trace_parent) if trace_parent is not None else None


def _drafts(caller: Principal, events: Sequence[event_pb2.EventInput]) -> list[EventDraft]:
    if not 1 <= len(events) <= BATCH_MAX:
        raise InvalidArgument.of(
            "events",
            f"must hold 1 to {BATCH_MAX} events, not {len(events)}",
            reason="BATCH_SIZE",
        )
    for event in events:
        caller.require_merchant(event.merchant_id)
    return [event_draft(event) for event in events]


def _result(result: PublishResult) -> pb.PublishResult:
    if isinstance(result, PostriderError):
        return pb.PublishResult(
            status=pb.PUBLISH_STATUS_REJECTED, reason=result.reason, message=result.message
        )
    status = pb.PUBLISH_STATUS_DUPLICATE if result.duplicate else pb.PUBLISH_STATUS_ACCEPTED
    message = pb.PublishResult(status=status)
    fill_event(message.event, result)
    return message


def _not_ascending(sequence: int, last: int) -> InvalidArgument:
    return InvalidArgument.of(
        "sequence",
        f"is {sequence} after {last}: number the batches of a stream in ascending order",
        reason="SEQUENCE_NOT_ASCENDING",
    )


def _expired() -> Unauthenticated:
    return Unauthenticated(
        "the token of this stream has expired: open a new stream with a new token, and send the "
        "unacknowledged batches again",
        reason="TOKEN_EXPIRED",
    )


def _stopping() -> Unavailable:
    return Unavailable(
        "this server is stopping: open the stream again, and send the unacknowledged batches again",
        reason="SERVER_STOPPING",
    )
