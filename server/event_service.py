"""EventService: thin over ingest; who may publish for whom is decided here."""

from typing import Any

import grpc

from core.errors import InvalidArgument, PermissionDenied, PostriderError
from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc
from server import convert
from server.authentication import principal
from server.ingest import Ingest, PublishedEvent
from server.principal import Principal, Scope

type Context = grpc.aio.ServicerContext[Any, Any]
pb = event_service_pb2

BATCH_MAX = 1000


class EventService(event_service_pb2_grpc.EventServiceServicer):
    """OK is answered only after the commit."""

    def __init__(self, ingest: Ingest):
        self._ingest = ingest

    async def PublishEvent(
        self, request: pb.PublishEventRequest, context: Context
    ) -> pb.PublishEventResponse:
        caller = _publisher()
        _require_own_merchant(caller, request.event)
        [result] = await self._ingest.publish([convert.event_draft(request.event)], "event")
        if isinstance(result, PostriderError):
            raise result
        return pb.PublishEventResponse(
            event=convert.event_message(result), duplicate=result.duplicate
        )

    async def PublishEvents(
        self, request: pb.PublishEventsRequest, context: Context
    ) -> pb.PublishEventsResponse:
        caller = _publisher()
        if not 1 <= len(request.events) <= BATCH_MAX:
            raise InvalidArgument.of(
                "events",
                f"must hold 1 to {BATCH_MAX} events, not {len(request.events)}",
                reason="BATCH_SIZE",
            )
        for event in request.events:
            _require_own_merchant(caller, event)
        drafts = [convert.event_draft(event) for event in request.events]
        results = await self._ingest.publish(drafts, "events[{}]")
        return pb.PublishEventsResponse(results=[_result(result) for result in results])


def _publisher() -> Principal:
    caller = principal()
    caller.require(Scope.PUBLISH)
    return caller


def _require_own_merchant(caller: Principal, event: event_pb2.EventInput) -> None:
    if caller.merchant_id is not None and event.merchant_id != caller.merchant_id:
        raise PermissionDenied(
            "this token publishes for the merchant of its merchant_id claim only",
            reason="MERCHANT_MISMATCH",
        )


def _result(result: PublishedEvent | PostriderError) -> pb.PublishResult:
    if isinstance(result, PostriderError):
        return pb.PublishResult(
            status=pb.PUBLISH_STATUS_REJECTED, reason=result.reason, message=result.message
        )
    status = pb.PUBLISH_STATUS_DUPLICATE if result.duplicate else pb.PUBLISH_STATUS_ACCEPTED
    return pb.PublishResult(status=status, event=convert.event_message(result))
