"""No call gets past this interceptor without a valid token, except to the methods named public.

It decides before the request is read: a refused call costs us its headers only, and a method that
does not exist looks like any other until the caller is known. Refusals are raised by the handler
it returns, so that the interceptors outside of this one turn them into statuses.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

import grpc

from server.caller_limits import CallerLimits
from server.principal import Principal
from server.tokens import TokenVerifier, token_refused

type Handler = grpc.RpcMethodHandler[Any, Any]

# gRPC runs the interceptors and the handler of a call in one task that only this call has. What is
# set here is therefore seen by the handler and by what wraps it, and by no other call.
current_principal: ContextVar[Principal] = ContextVar("current_principal")
_refusal: ContextVar[Exception] = ContextVar("refusal")


def principal() -> Principal:
    """The caller of the present call; a public method has none, which is an Unauthenticated."""
    try:
        return current_principal.get()
    except LookupError:
        raise token_refused() from None


class AuthenticationInterceptor(grpc.aio.ServerInterceptor):
    """Verifies `authorization: Bearer <JWT>`; public methods are `/package.Service/Method`.

    A caller that is known is then asked for no more than its limits allow.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        limits: CallerLimits,
        public_methods: frozenset[str] = frozenset(),
    ):
        self._verifier = verifier
        self._limits = limits
        self._public_methods = public_methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        if handler_call_details.method not in self._public_methods:
            try:
                token = _bearer_token(handler_call_details.invocation_metadata)
                caller = await self._verifier.verify(token)
                current_principal.set(caller)
                self._limits.admit(caller, handler_call_details.method)
            # Not only our own errors: what escapes from here, gRPC sends to the client as it is.
            except Exception as error:
                _refusal.set(error)
                return _REFUSING
        return await continuation(handler_call_details)


def _bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    # Of two tokens one would be checked and the other perhaps logged or believed elsewhere.
    if len(values) != 1 or not isinstance(values[0], str):
        raise token_refused()
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise token_refused()
    return token


async def _refuse(_requests: object, _context: object) -> AsyncIterator[bytes]:
    raise _refusal.get()
    # Makes it an async generator, which is what wrappers expect of a stream handler.
    yield b""  # type: ignore[unreachable]


#: Stands in for handlers of all four kinds: this one is called before any message is read.
_REFUSING: Handler = grpc.stream_stream_rpc_method_handler(_refuse)
