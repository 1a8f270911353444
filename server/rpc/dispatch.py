"""Dispatches calls: each gets a request id, a caller, one report, and its errors as statuses.

A caller sees the text of an exception only if the exception is one of core/errors.py.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from core.errors import InvalidArgument, PostriderError
from server.rpc.audit_refusals import RefusalAudit
from server.rpc.authenticate import Authentication
from server.rpc.call import RpcCall, begin_call, current_call
from server.rpc.report import RpcReports
from server.rpc.status import internal_status, to_domain_error, to_status

type Handler = grpc.RpcMethodHandler[Any, Any]
type Context = grpc.aio.ServicerContext[Any, Any]
type Read = Callable[[bytes], Any]

log = structlog.get_logger()


class Calls(grpc.GenericRpcHandler):
    """Finds the handler of a call among `services` and wraps it.

    It is not an interceptor, because gRPC awaits each of those and nothing here has to wait.
    """

    def __init__(
        self,
        services: Sequence[grpc.GenericRpcHandler],
        authentication: Authentication,
        refusals: RefusalAudit,
        reports: RpcReports,
    ):
        self._services = services
        self._authentication = authentication
        self._refusals = refusals
        self._reports = reports
        # One per method, one per method that authenticates first, and one that refuses.
        self._wrapped: dict[Handler, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        call = begin_call(handler_call_details.method, handler_call_details.invocation_metadata)
        self._reports.begin(call)
        handler = self._authentication.guard(call, self._find(handler_call_details))
        if handler is None:
            # gRPC answers the caller.
            self._reports.end(call, "UNIMPLEMENTED")
            return None
        wrapped = self._wrapped.get(handler)
        if wrapped is None:
            wrapped = self._wrapped[handler] = _wrap(handler, self._refusals, self._reports)
        return wrapped

    def _find(self, details: grpc.HandlerCallDetails) -> Handler | None:
        for service in self._services:
            if (handler := service.service(details)) is not None:
                return handler
        return None


def _wrap(handler: Handler, refusals: RefusalAudit, reports: RpcReports) -> Handler:
    """Return the same handler with a report, and with every error as a status."""
    read = _checked_deserializer(handler.request_deserializer)
    # gRPC reads the single message of a call before the handler runs, so a malformed one could not
    # be answered. It is passed as bytes and deserialized in the handler.
    codecs = {
        "request_deserializer": read if handler.request_streaming else None,
        "response_serializer": handler.response_serializer,
    }
    take = None if handler.request_streaming else read
    if handler.response_streaming:
        behaviour = handler.stream_stream or handler.unary_stream
        responses = _streaming(behaviour, take, refusals, reports)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(responses, **codecs)
        return grpc.unary_stream_rpc_method_handler(responses, **codecs)
    answer = _unary(handler.stream_unary or handler.unary_unary, take, refusals, reports)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(answer, **codecs)
    return grpc.unary_unary_rpc_method_handler(answer, **codecs)


def _checked_deserializer(deserializer: Read | None) -> Read | None:
    """Return the deserializer, with InvalidArgument for malformed bytes."""
    if deserializer is None:
        return None

    def read(message: bytes) -> Any:
        try:
            return deserializer(message)
        except DecodeError:
            raise InvalidArgument.of(
                "request",
                "is malformed: send the protobuf message of this call, with texts in UTF-8",
                reason="REQUEST_MALFORMED",
            ) from None

    return read


def _unary(behaviour: Any, take: Read | None, refusals: RefusalAudit, reports: RpcReports) -> Any:
    async def answer(request: Any, context: Context) -> Any:
        call = current_call()
        call.context = context
        try:
            if take is not None:
                request = take(request)
            response = await behaviour(request, context)
        except asyncio.CancelledError:
            reports.end(call, "CANCELLED")
            raise
        except Exception as error:
            await _abort(call, error, refusals, reports, request)
        else:
            reports.end(call, "OK")
            return response

    return answer


def _streaming(
    behaviour: Any, take: Read | None, refusals: RefusalAudit, reports: RpcReports
) -> Any:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        call = current_call()
        call.context = context
        try:
            if take is not None:
                request = take(request)
            responses = behaviour(request, context)
            if inspect.isawaitable(responses):
                # A handler may also write to the context instead of yielding.
                await responses
                return
            async for response in responses:
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            reports.end(call, "CANCELLED")
            raise
        except Exception as error:
            await _abort(call, error, refusals, reports, request)
        else:
            reports.end(call, "OK")

    return answer


async def _abort(
    call: RpcCall,
    error: Exception,
    refusals: RefusalAudit,
    reports: RpcReports,
    request: object,
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        # A handler of a library, such as health or reflection, has already answered.
        reports.end(call, call.context.code().name, peer=call.context.peer())
        raise error
    domain_error = to_domain_error(error)
    known = rpc_status.to_status(_status_of(error, domain_error, call))
    reports.end(
        call,
        known.code.name,
        reason=domain_error.reason if domain_error else "INTERNAL",
        message=known.details,
        peer=call.context.peer(),
    )
    if domain_error is not None:
        await refusals.record(domain_error, call, request)
    await call.context.abort_with_status(known)


def _status_of(
    error: Exception, domain_error: PostriderError | None, call: RpcCall
) -> status_pb2.Status:
    if domain_error is None:
        log.error("rpc_broke", exc_info=error, method=call.method, reference=call.request_id)
        return internal_status(call.request_id)
    if domain_error is not error:
        log.warning("dependency_away", method=call.method, error=repr(error))
    return to_status(domain_error)
