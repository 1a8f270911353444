"""A fake EventService with the contract of publishing. Tests set its failures."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc

pb = event_service_pb2
type Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Refusal:
    """The error that the next call ends with."""

    code: grpc.StatusCode
    retry_seconds: float | None = None


class FakeEventService(event_service_pb2_grpc.EventServiceServicer):
    """`stored` maps idempotency keys to event ids."""

    def __init__(self) -> None:
        self.stored: dict[str, str] = {}
        self.calls: list[str] = []
        self.tokens: list[str] = []
        self.batches: list[int] = []
        self.sequences: list[list[int]] = []
        self.refusals: deque[Refusal] = deque()
        self.stream_refusals: deque[Refusal] = deque()
        #: How many batches each stream stores before it breaks. It does not acknowledge the last.
        self.break_after: deque[int] = deque()
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.active = self.most_active = 0
        self.arrived = asyncio.Condition()

    async def wait_for_calls(self, count: int) -> None:
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(lambda: len(self.calls) >= count)

    async def PublishEvent(self, request: pb.PublishEventRequest, context: Context) -> Any:  # noqa: N802
        await self._begin("PublishEvent", context, self.refusals)
        result = self._store(request.event)
        return pb.PublishEventResponse(
            event=result.event, duplicate=result.status == pb.PUBLISH_STATUS_DUPLICATE
        )

    async def PublishEvents(self, request: pb.PublishEventsRequest, context: Context) -> Any:  # noqa: N802
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            await self._begin("PublishEvents", context, self.refusals)
            self.batches.append(len(request.events))
            return pb.PublishEventsResponse(results=self._store_all(request.events))
        finally:
            self.active -= 1

    async def StreamEvents(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StreamEventsRequest], context: Context
    ) -> AsyncIterator[pb.StreamEventsResponse]:
        await self._begin("StreamEvents", context, self.stream_refusals)
        left = self.break_after.popleft() if self.break_after else None
        sequences: list[int] = []
        self.sequences.append(sequences)
        async for request in request_iterator:
            assert not sequences or request.sequence > sequences[-1]
            sequences.append(request.sequence)
            self.batches.append(len(request.events))
            results = self._store_all(request.events)
            if left is not None and len(sequences) >= left:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            yield pb.StreamEventsResponse(sequence=request.sequence, results=results)

    async def GetEvent(self, request: pb.GetEventRequest, context: Context) -> Any:  # noqa: N802
        await self._begin("GetEvent", context, self.refusals)
        return pb.GetEventResponse(event=event_pb2.Event(id=request.id))

    async def ListEvents(  # noqa: N802
        self,
        request: pb.ListEventsRequest,  # noqa: ARG002
        context: Context,
    ) -> Any:
        await self._begin("ListEvents", context, self.refusals)
        return pb.ListEventsResponse()

    async def _begin(self, method: str, context: Context, refusals: deque[Refusal]) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self.tokens.append(str(metadata["authorization"]).removeprefix("Bearer "))
        async with self.arrived:
            self.calls.append(method)
            self.arrived.notify_all()
        await self.open_gate.wait()
        if refusals:
            await context.abort_with_status(_status(refusals.popleft()))

    def _store_all(self, events: Sequence[event_pb2.EventInput]) -> list[pb.PublishResult]:
        return [self._store(event) for event in events]

    def _store(self, event: event_pb2.EventInput) -> pb.PublishResult:
        if event.type == "wrong.type":
            return pb.PublishResult(
                status=pb.PUBLISH_STATUS_REJECTED, reason="EVENT_TYPE", message="not registered"
            )
        key = event.idempotency_key
        assert key
        status = pb.PUBLISH_STATUS_DUPLICATE if key in self.stored else pb.PUBLISH_STATUS_ACCEPTED
        event_id = self.stored.setdefault(key, f"evt_{len(self.stored)}")
        return pb.PublishResult(status=status, event=event_pb2.Event(id=event_id))


@asynccontextmanager
async def serving(
    service: Any,
    add: Callable[[Any, Any], None] = event_service_pb2_grpc.add_EventServiceServicer_to_server,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[str]:
    """The address of a grpc.aio server with this service."""
    server = grpc.aio.server()
    add(service, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def _status(refusal: Refusal) -> Any:
    status = status_pb2.Status(
        code=code_pb2.Code.Value(refusal.code.name), message="refused on purpose"
    )
    if refusal.retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(refusal.retry_seconds * 1000))
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(detail)
    return rpc_status.to_status(status)
