"""Authenticates calls: no call reaches its handler without a known caller, except public methods.

A bearer token identifies the caller. The certificate of the connection counts only for a call
without `authorization`, so a bad token is refused with any certificate.

The decision is made before the request is read. So a refused call costs only its headers, and an
unknown caller cannot find out which methods exist. The returned handler raises the refusal, so that
the dispatcher turns it into a status.
"""

import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from core.errors import InvalidArgument
from server.auth.certificates import CertificateCallers
from server.auth.principal import Principal
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier, token_refused
from server.rpc.call import RpcCall, current_call

type Handler = grpc.RpcMethodHandler[Any, Any]


def principal() -> Principal:
    """Return the caller of the current call. Raises Unauthenticated in a public method."""
    caller = current_call().caller
    if caller is None:
        raise token_refused()
    return caller


class Authentication:
    """Verifies `authorization: Bearer <JWT>`; public methods are `/package.Service/Method`.

    `certificates` is None if every call needs a token. Known callers are subject to `limits`.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        limits: CallerLimits,
        public_methods: frozenset[str] = frozenset(),
        certificates: CertificateCallers | None = None,
    ):
        self._verifier = verifier
        self._limits = limits
        self._certificates = certificates
        self._public_methods = public_methods
        # One per method, and one for unknown methods.
        self._wrapped: dict[Handler | None, Handler] = {}

    def guard(self, call: RpcCall, handler: Handler | None) -> Handler | None:
        """Return the handler, one that authenticates first, or one that refuses.

        Nothing here waits. Most tokens were verified before, so that their calls cost no more.
        """
        if call.method in self._public_methods:
            return handler
        try:
            if not call.authorization and self._certificates is not None:
                return self._authenticating(handler)
            call.token = _bearer_token(call.authorization)
            caller = self._verifier.recall(call.token)
            if caller is None:
                return self._authenticating(handler)
            self._admit(call, caller)
        # All errors, because gRPC would send the text of others to the client.
        except Exception as error:
            call.refusal = error
            return _REFUSING
        return handler

    def _admit(self, call: RpcCall, caller: Principal) -> None:
        call.caller = caller
        self._limits.admit(caller, call.method)

    def _authenticating(self, handler: Handler | None) -> Handler:
        wrapped = self._wrapped.get(handler)
        if wrapped is None:
            wrapped = self._wrapped[handler] = self._identifies(handler)
        return wrapped

    def _identifies(self, handler: Handler | None) -> Handler:
        """Return a handler that authenticates and then calls `handler`.

        Only a handler can wait and see the certificate. It is a stream handler, because that one
        decides when to read the request.
        """

        async def behaviour(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            call = current_call()
            self._admit(call, await self._identify(call.token, context))
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            async for response in _responses(handler, requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(
            behaviour,
            handler.request_deserializer if handler else None,
            handler.response_serializer if handler else None,
        )

    async def _identify(self, token: str | None, context: Any) -> Principal:
        if token is not None:
            return await self._verifier.verify(token)
        if self._certificates is not None:
            return self._certificates.identify(context.auth_context())
        raise token_refused()


async def _responses(
    handler: Any, requests: AsyncIterator[Any], context: Any
) -> AsyncIterator[Any]:
    """Yield the responses of a handler of any kind. On the wire all kinds are the same."""
    request: Any = requests
    if not handler.request_streaming:
        request = await context.read()
        if request is grpc.aio.EOF:
            # The caller sent no message, or gRPC refused it as too large.
            raise InvalidArgument.of("request", "is missing", reason="REQUEST_MALFORMED")
        current_call().message = request
    if not handler.response_streaming:
        yield await (handler.unary_unary or handler.stream_unary)(request, context)
        return
    responses = (handler.unary_stream or handler.stream_stream)(request, context)
    if inspect.isawaitable(responses):
        # A handler may also write to the context instead of yielding.
        await responses
        return
    async for response in responses:
        yield response


def _bearer_token(values: Sequence[str | bytes]) -> str:
    # With two tokens, another component might use the one that is not checked here.
    if len(values) != 1 or not isinstance(values[0], str):
        raise token_refused()
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise token_refused()
    return token


async def _refuse(_requests: object, _context: object) -> AsyncIterator[bytes]:
    raise current_call().refusal or token_refused()
    # Makes this an async generator, as the dispatcher expects.
    yield b""  # type: ignore[unreachable]


#: Replaces handlers of all four kinds. It runs before any message is read.
_REFUSING: Handler = grpc.stream_stream_rpc_method_handler(_refuse)
