"""The outermost interceptor: a request id, one log line a call, and every error as a status.

Nothing an exception says reaches a caller unless core/errors.py made it to be said.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter
from typing import Any

import grpc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from server.authentication import current_principal
from server.request_id import begin_request, current_request_id
from server.status import internal_status, to_domain_error, to_status

type Handler = grpc.RpcMethodHandler[Any, Any]
type Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler, also the refusals of the interceptor inside this one.

    That one is called from here, since each interceptor that gRPC calls has its price in every RPC.
    """

    def __init__(self, inside: grpc.aio.ServerInterceptor):
        self._inside = inside

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        began = perf_counter()
        begin_request(handler_call_details.invocation_metadata)
        handler = await self._inside.intercept_service(continuation, handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            behaviour = _streaming(handler.stream_stream or handler.unary_stream, method, began)
            if handler.request_streaming:
                return grpc.stream_stream_rpc_method_handler(behaviour, **codecs)
            return grpc.unary_stream_rpc_method_handler(behaviour, **codecs)
        answer = _unary(handler.stream_unary or handler.unary_unary, method, began)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(answer, **codecs)
        return grpc.unary_unary_rpc_method_handler(answer, **codecs)


def _unary(behaviour: Any, method: str, began: float) -> Any:
    async def answer(request: Any, context: Context) -> Any:
        try:
            response = await behaviour(request, context)
        except asyncio.CancelledError:
            _log(method, "CANCELLED", began)
            raise
        except Exception as error:
            await _abort(context, error, method, began)
        else:
            _log(method, "OK", began)
            return response

    return answer


def _streaming(behaviour: Any, method: str, began: float) -> Any:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            responses = behaviour(request, context)
            if inspect.isawaitable(responses):
                # A handler may also write to the context instead of yielding.
                await responses
                return
            async for response in responses:
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            _log(method, "CANCELLED", began)
            raise
        except Exception as error:
            await _abort(context, error, method, began)
        else:
            _log(method, "OK", began)

    return answer


async def _abort(context: Context, error: Exception, method: str, began: float) -> None:
    if isinstance(error, grpc.aio.AbortError):
        # A handler of a library (health, reflection) has already answered.
        raise error
    status = _status_of(error, method)
    known = rpc_status.to_status(status)
    _log(method, known.code.name, began, message=status.message)
    await context.abort_with_status(known)


def _status_of(error: Exception, method: str) -> status_pb2.Status:
    domain_error = to_domain_error(error)
    if domain_error is None:
        log.error("rpc_broke", exc_info=error, method=method, reference=current_request_id.get())
        return internal_status(current_request_id.get())
    if domain_error is not error:
        log.warning("dependency_away", method=method, error=repr(error))
    return to_status(domain_error)


def _log(method: str, code: str, began: float, **fields: str) -> None:
    principal = current_principal.get(None)
    log.info(
        "rpc",
        method=method,
        code=code,
        duration_ms=round((perf_counter() - began) * 1000, 3),
        request_id=current_request_id.get(),
        subject=principal.subject if principal else None,
        merchant_id=principal.merchant_id if principal else None,
        **fields,
    )
