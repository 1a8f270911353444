"""What every call gets: a token, a deadline, and repeats when these can do no harm.

A client without a source of tokens is known by its certificate.

Repeated are reads, and publishes, whose events get an idempotency key when they have none. All else
is sent once, since a call that was answered UNAVAILABLE may have been carried out.
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
    """Deadlines and waits; a `timeout=` given with a call replaces the deadline."""

    #: For a call with all its repeats.
    deadline_seconds: float = 30.0
    #: For one attempt of a call that may be repeated: the peer may be frozen.
    attempt_seconds: float = 12.0
    backoff_seconds: float = 0.1
    backoff_max_seconds: float = 5.0

    def wait_seconds(self, attempt: int, error: grpc.aio.AioRpcError) -> float:
        """Before the next attempt: never less than the server asked for, and never in step."""
        backoff = min(self.backoff_seconds * 2.0**attempt, self.backoff_max_seconds)
        asked = retry_delay(error)
        if asked is not None and asked >= backoff:
            return asked * random.uniform(1.0, 1.2)  # noqa: S311 - spreads load, hides nothing
        return max(asked or 0.0, backoff * random.uniform(0.5, 1.0))  # noqa: S311


class UnaryCalls(grpc.aio.UnaryUnaryClientInterceptor):
    """Token, deadline and repeats for calls with one request and one answer."""

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
            request = with_keys(request)
        repeatable = method in _PUBLISHES or method.startswith(_READS)
        total = self._policy.deadline_seconds if details.timeout is None else details.timeout
        ends_at = monotonic() + total
        attempt = 0
        while True:
            metadata = await _authorized(self._tokens, details.metadata, ends_at - monotonic())
            left = max(ends_at - monotonic(), 0.0)
            timeout = min(left, self._policy.attempt_seconds) if repeatable else left
            call = await continuation(
                _changed(details, metadata=metadata, timeout=timeout), request
            )
            code = await call.code()
            if code is grpc.StatusCode.OK or not repeatable:
                return call
            error = await error_of(call)
            wait = self._policy.wait_seconds(attempt, error)
            if not is_passing(error) or monotonic() + wait >= ends_at:
                return call
            await asyncio.sleep(wait)
            attempt += 1


class UnaryStreamCalls(grpc.aio.UnaryStreamClientInterceptor):
    """A token for streams of answers, which live as long as the caller reads."""

    def __init__(self, tokens: TokenCache | None, policy: CallPolicy):
        self._tokens = tokens
        self._policy = policy

    async def intercept_unary_stream(
        self, continuation: Continuation, client_call_details: ClientCallDetails, request: Any
    ) -> Any:
        details = client_call_details
        metadata = await _authorized(self._tokens, details.metadata, self._policy.deadline_seconds)
        return await continuation(_changed(details, metadata=metadata), request)


class StreamStreamCalls(grpc.aio.StreamStreamClientInterceptor):
    """A token for streams of both; who uses one bounds the waits for its answers."""

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


def with_keys(request: Any) -> Any:
    """The request, or a copy in which every event has an idempotency key."""
    if isinstance(request, event_service_pb2.PublishEventRequest):
        if request.event.idempotency_key:
            return request
        one = event_service_pb2.PublishEventRequest()
        one.event.CopyFrom(keyed(request.event))
        return one
    if all(event.idempotency_key for event in request.events):
        return request
    return event_service_pb2.PublishEventsRequest(events=[keyed(e) for e in request.events])


def keyed(event: event_pb2.EventInput) -> event_pb2.EventInput:
    """The event, or a copy with a new idempotency key when it has none."""
    if event.idempotency_key:
        return event
    copy = event_pb2.EventInput()
    copy.CopyFrom(event)
    copy.idempotency_key = f"client-{uuid.uuid4().hex}"
    return copy


def is_passing(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same call may succeed a little later."""
    passing = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    return error.code() in passing or retry_delay(error) is not None


def retry_delay(error: grpc.aio.AioRpcError) -> float | None:
    """Seconds the server asked us to wait (RetryInfo); None when it did not say."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        # Details that contradict the status: not of our server's making.
        return None
    for detail in status.details if status else ():
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            return float(info.retry_delay.ToNanoseconds()) / 1e9
    return None


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """The error a failed call raises when it is awaited."""
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
    """A copy; gRPC's details are a named tuple, which its types do not say."""
    changed: ClientCallDetails = details._replace(**fields)
    return changed


def _method_name(details: ClientCallDetails) -> str:
    method: Any = details.method
    path = method.decode() if isinstance(method, bytes) else str(method)
    return path.rpartition("/")[2]
