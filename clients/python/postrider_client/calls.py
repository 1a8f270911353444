"""Interceptors that add a token and a deadline to each call and repeat safe calls.

Reads and publishes are repeated. Events without an idempotency key get one first. All other calls
are sent once, because a call that failed with UNAVAILABLE may have been executed.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc.aio import ClientCallDetails, Metadata
from grpc_status import rpc_status

from postrider.v1 import event_pb2, event_service_pb2
from postrider_client.errors import TokenUnavailable
from postrider_client.tokens import TokenCache

type Continuation = Callable[[ClientCallDetails, Any], Awaitable[Any]]

_PUBLISHES = ("PublishEvent", "PublishEvents")
_READS = ("Get", "List")


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """Deadlines and backoff. The `timeout=` of a call replaces `deadline_seconds`."""

    #: For a call including all repeats.
    deadline_seconds: float = 30.0
    #: For one attempt of a repeatable call, because the server may be frozen.
    attempt_seconds: float = 12.0
    backoff_seconds: float = 0.1
    backoff_max_seconds: float = 5.0

    def wait_seconds(self, attempt: int, error: grpc.aio.AioRpcError) -> float:
        """Return the wait before the next attempt, with jitter. At least the server's RetryInfo."""
        backoff = min(self.backoff_seconds * 2.0**attempt, self.backoff_max_seconds)
        requested = retry_delay(error)
        if requested is not None and requested >= backoff:
            return requested * random.uniform(1.0, 1.2)  # noqa: S311 - jitter, no secret
        return max(requested or 0.0, backoff * random.uniform(0.5, 1.0))  # noqa: S311


class UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds a token, a deadline and repeats to calls with one request and one response."""

    def __init__(self, tokens: TokenCache | None, policy: CallPolicy):
        self._tokens = tokens
        self._policy = policy

    async def intercept_unary_unary(
        self,
        continuation: Continuation,
        client_call_details: ClientCallDetails,
        request: Any,
    ) -> Any:
        details = client_call_details
        method = _method_name(details)
        if method in _PUBLISHES:
            request = with_idempotency_keys(request)
        repeatable = method in _PUBLISHES or method.startswith(_READS)
        total = self._policy.deadline_seconds if details.timeout is None else details.timeout
        deadline = monotonic() + total
        attempt = 0
        while True:
            metadata = await _authorized(self._tokens, details.metadata, deadline - monotonic())
            remaining = max(deadline - monotonic(), 0.0)
            timeout = remaining
            if repeatable:
                timeout = min(remaining, self._policy.attempt_seconds)
            call = await continuation(
                _changed(details, metadata=metadata, timeout=timeout), request
            )
            code = await call.code()
            if code is grpc.StatusCode.OK or not repeatable:
                return call
            error = await error_of(call)
            wait = self._policy.wait_seconds(attempt, error)
            if not is_transient(error) or monotonic() + wait >= deadline:
                return call
            await asyncio.sleep(wait)
            attempt += 1


class ResponseStreamInterceptor(grpc.aio.UnaryStreamClientInterceptor):
    """Adds a token to response streams, which have no deadline."""

    def __init__(self, tokens: TokenCache | None, policy: CallPolicy):
        self._tokens = tokens
        self._policy = policy

    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        details = client_call_details
        metadata = await _authorized(self._tokens, details.metadata, self._policy.deadline_seconds)
        return await continuation(_changed(details, metadata=metadata), request)


class BidirectionalStreamInterceptor(grpc.aio.StreamStreamClientInterceptor):
    """Adds a token to bidirectional streams. Their users limit the wait for responses."""

    def __init__(self, tokens: TokenCache | None, policy: CallPolicy):
        self._tokens = tokens
        self._policy = policy

    async def intercept_stream_stream(
        self,
        continuation: Continuation,
        client_call_details: ClientCallDetails,
        request_iterator: AsyncIterable[Any] | Iterable[Any],
    ) -> Any:
        details = client_call_details
        metadata = await _authorized(self._tokens, details.metadata, self._policy.deadline_seconds)
        return await continuation(_changed(details, metadata=metadata), request_iterator)


def with_idempotency_keys(request: Any) -> Any:
    """Return the request, or a copy in which every event has an idempotency key."""
    if isinstance(request, event_service_pb2.PublishEventRequest):
        if request.event.idempotency_key:
            return request
        return event_service_pb2.PublishEventRequest(event=with_idempotency_key(request.event))
    if all(event.idempotency_key for event in request.events):
        return request
    return event_service_pb2.PublishEventsRequest(
        events=[with_idempotency_key(event) for event in request.events]
    )


def with_idempotency_key(event: event_pb2.EventInput) -> event_pb2.EventInput:
    """Return the event, or a copy with a new idempotency key if it has none."""
    if event.idempotency_key:
        return event
    copy = event_pb2.EventInput()
    copy.CopyFrom(event)
    copy.idempotency_key = f"client-{uuid.uuid4().hex}"
    return copy


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Return whether the same call may succeed later."""
    transient = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    return error.code() in transient or retry_delay(error) is not None


def retry_delay(error: grpc.aio.AioRpcError) -> float | None:
    """Return the wait in seconds that the server requested (RetryInfo), or None."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        # Details that contradict the status come from a proxy.
        return None
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            return float(info.retry_delay.ToNanoseconds()) / 1e9
    return None


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """Return the error that a failed call raises when it is awaited."""
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata() or Metadata(),
        await call.trailing_metadata() or Metadata(),
        details=await call.details(),
    )


async def _authorized(
    tokens: TokenCache | None, given: Metadata | None, seconds: float
) -> Metadata:
    if tokens is None:
        return Metadata(*(given or ()))
    try:
        async with asyncio.timeout(max(seconds, 0.0)):
            token = await tokens.get()
    except TimeoutError as error:
        raise TokenUnavailable("the token source did not answer within the deadline") from error
    return Metadata(*(given or ()), ("authorization", f"Bearer {token}"))


def _changed(details: Any, **fields: Any) -> ClientCallDetails:
    """Return a changed copy. gRPC's details are a named tuple, but its type stubs differ."""
    changed: ClientCallDetails = details._replace(**fields)
    return changed


def _method_name(details: ClientCallDetails) -> str:
    method: Any = details.method
    path = method.decode() if isinstance(method, bytes) else str(method)
    return path.rpartition("/")[2]
