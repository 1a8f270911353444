"""No call reaches its handler without a known caller, except of the methods named public.

A token says who calls. Only a call without any `authorization` may be known by the certificate of
its connection: a bad token is refused whatever certificate stands behind it.

It decides before the request is read: a refused call costs us its headers only, and a method that
does not exist looks like any other until the caller is known. Refusals are raised by the handler
it returns, so that what wraps handlers turns them into statuses.
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
    """The caller of the present call; a public method has none, which is an Unauthenticated."""
    caller = current_call().caller
    if caller is None:
        raise token_refused()
    return caller


class Authentication:
    """Verifies `authorization: Bearer <JWT>`; public methods are `/package.Service/Method`.

    `certificates` is None where nobody may call without a token. A caller that is known is then
    asked for no more than its limits allow.
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
        # As many as there are methods, and one for all that there are not.
        self._identifying: dict[Handler | None, Handler] = {}

    def guard(self, call: RpcCall, handler: Handler | None) -> Handler | None:
        """What may answer this call: its handler, or one that first asks who calls, or refuses.

        Nothing here waits. Whom a token stands for is mostly known, and so the call costs no more.
        """
        if call.method in self._public_methods:
            return handler
        try:
            if not call.authorization and self._certificates is not None:
                return self._identified(handler)
            call.token = _bearer_token(call.authorization)
            caller = self._verifier.recall(call.token)
            if caller is None:
                return self._identified(handler)
            self._admit(call, caller)
        # Not only our own errors: what escapes from here, gRPC sends to the client as it is.
        except Exception as error:
            call.refusal = error
            return _REFUSING
        return handler

    def _admit(self, call: RpcCall, caller: Principal) -> None:
        call.caller = caller
        self._limits.admit(caller, call.method)

    def _identified(self, handler: Handler | None) -> Handler:
        identifying = self._identifying.get(handler)
        if identifying is None:
            identifying = self._identifying[handler] = self._identifies(handler)
        return identifying

    def _identifies(self, handler: Handler | None) -> Handler:
        """Certificates are known, and waiting is possible, in a handler only.

        One of streams, which reads when it likes.
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
    """What a handler of any kind answers, as a stream; on the wire they are all the same."""
    request: Any = requests
    if not handler.request_streaming:
        request = await context.read()
        if request is grpc.aio.EOF:
            # Of a call that is over already, such as one with a message that gRPC refused as too
            # large, or of a caller that sends none: the caller's doing, and no fault of ours.
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
    # Of two tokens one would be checked and the other perhaps logged or believed elsewhere.
    if len(values) != 1 or not isinstance(values[0], str):
        raise token_refused()
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise token_refused()
    return token


async def _refuse(_requests: object, _context: object) -> AsyncIterator[bytes]:
    raise current_call().refusal or token_refused()
    # Makes it an async generator, which is what wrappers expect of a stream handler.
    yield b""  # type: ignore[unreachable]


#: Stands in for handlers of all four kinds: this one is called before any message is read.
_REFUSING: Handler = grpc.stream_stream_rpc_method_handler(_refuse)
