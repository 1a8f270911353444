"""Authentication through a real server, under an outer interceptor as in production."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import pytest_asyncio

from cli.dev.signing_key import ensure_development_key, mint_token
from core.errors import Unauthenticated, Unavailable
from server.auth.jwks import PemKeys, VerificationKey
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier, token_refused
from server.rpc.authenticate import Authentication, principal
from server.rpc.call import begin_call, current_call
from server.settings import ServerSettings

ISSUER = "https://id.example.com/"
KINDS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "ReadWrite")
UNKNOWN = "Missing"
METHODS = (*KINDS, UNKNOWN)
PUBLIC = frozenset({"/test.Echo/Public", "/test.Echo/PublicByMistake"})


class Echo:
    """Answers every request with the caller's subject; notes what reached a handler."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def _who(self) -> bytes:
        self.reached.append(principal().subject)
        return principal().subject.encode()

    async def unary_unary(self, _request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0)
        return self._who()

    async def unary_stream(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield self._who()
        await asyncio.sleep(0)
        yield self._who()

    async def stream_unary(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        return b"".join([self._who() async for _ in requests])

    async def stream_stream(
        self, requests: AsyncIterator[bytes], _context: Any
    ) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield self._who()

    async def read_write(self, _requests: AsyncIterator[bytes], context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(self._who())

    async def public(self, _request: bytes, _context: Any) -> bytes:
        return b"anybody" if current_call().caller is None else self._who()

    async def public_by_mistake(self, _request: bytes, _context: Any) -> bytes:
        return self._who()

    def handlers(self) -> dict[str, Any]:
        return {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream),
            "ReadWrite": grpc.stream_stream_rpc_method_handler(self.read_write),
            "Public": grpc.unary_unary_rpc_method_handler(self.public),
            "PublicByMistake": grpc.unary_unary_rpc_method_handler(self.public_by_mistake),
        }


class Guarded(grpc.GenericRpcHandler):
    """What a server asks for its handlers."""

    def __init__(self, authentication: Authentication, handlers: dict[str, Any]):
        self._authentication = authentication
        self._echo = grpc.method_handlers_generic_handler("test.Echo", handlers)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        call = begin_call(handler_call_details.method, handler_call_details.invocation_metadata)
        return self._authentication.guard(call, self._echo.service(handler_call_details))


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Stands in for the outermost one: it knows the errors only as a handler raises them."""

    def __init__(self) -> None:
        self.raised: list[Exception] = []

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            behaviour = handler and (handler.unary_unary or handler.stream_unary)
            return handler and self._wrap_unary(handler, behaviour)
        return self._wrap_stream(handler, handler.unary_stream or handler.stream_stream)

    def _wrap_unary(self, handler: Any, behaviour: Any) -> Any:
        async def wrapped(request: Any, context: Any) -> Any:
            try:
                return await behaviour(request, context)
            except Exception as error:
                await self._abort(error, context)

        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(wrapped)
        return grpc.unary_unary_rpc_method_handler(wrapped)

    def _wrap_stream(self, handler: Any, behaviour: Any) -> Any:
        async def wrapped(request: Any, context: Any) -> None:
            try:
                answers = behaviour(request, context)
                if asyncio.iscoroutine(answers):
                    await answers
                    return
                async for answer in answers:
                    await context.write(answer)
            except Exception as error:
                await self._abort(error, context)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(wrapped)
        return grpc.unary_stream_rpc_method_handler(wrapped)

    async def _abort(self, error: Exception, context: Any) -> None:
        self.raised.append(error)
        match error:
            case Unauthenticated():
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)
            case Unavailable():
                await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            case _:
                await context.abort(grpc.StatusCode.INTERNAL, "internal error")


class BreakableKeys:
    """The development key, until the test says otherwise."""

    def __init__(self, keys: PemKeys):
        self._keys = keys
        self.fault: Exception | None = None

    async def keys_for(self, kid: str | None) -> tuple[VerificationKey, ...]:
        if self.fault is not None:
            raise self.fault
        return await self._keys.keys_for(kid)


class Refusal(NamedTuple):
    code: grpc.StatusCode
    details: str


NO_TOKEN = Refusal(grpc.StatusCode.UNAUTHENTICATED, token_refused().message)


@dataclass(frozen=True, slots=True)
class Service:
    """The running server, a channel to it, and what its parts have seen."""

    channel: grpc.aio.Channel
    echo: Echo
    status: StatusInterceptor
    keys: BreakableKeys
    mint: Callable[[str], str]

    def start(self, method: str, *metadata: tuple[str, str], size: int = 1) -> Any:
        """A call begun; one that streams its requests has sent none yet."""
        path, request = f"/test.Echo/{method}", b"x" * size
        channel: Any = self.channel
        match method:
            case "UnaryStream":
                return channel.unary_stream(path)(request, metadata=metadata, timeout=10)
            case "StreamUnary":
                return channel.stream_unary(path)(metadata=metadata, timeout=10)
            case "StreamStream" | "ReadWrite":
                return channel.stream_stream(path)(metadata=metadata, timeout=10)
            case _:
                return channel.unary_unary(path)(request, metadata=metadata, timeout=10)

    async def call(self, method: str, *metadata: tuple[str, str]) -> bytes:
        """Two requests where they stream, one where not; the answers joined."""
        call = self.start(method, *metadata)
        if method in {"StreamUnary", "StreamStream", "ReadWrite"}:
            await call.write(b"x")
            await call.write(b"x")
            await call.done_writing()
        if method in {"UnaryStream", "StreamStream", "ReadWrite"}:
            return b"".join([answer async for answer in call])
        return bytes(await call)

    async def refusal(self, method: str, *metadata: tuple[str, str], size: int = 1) -> Refusal:
        """How a call ends of which no request is sent before the answer, where they stream.

        (A client of grpc.aio that is writing just then may report INTERNAL: grpc/grpc#36066.)
        """
        call = self.start(method, *metadata, size=size)
        return Refusal(await call.code(), await call.details())

    def bearer(self, subject: str) -> tuple[str, str]:
        return ("authorization", f"Bearer {self.mint(subject)}")


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    pair = ensure_development_key(tmp_path)
    keys = BreakableKeys(PemKeys(pair.public_key_file))
    verifier = TokenVerifier(keys, issuer=ISSUER, audience="postrider", max_lifetime_seconds=3600)
    echo, status = Echo(), StatusInterceptor()
    authentication = Authentication(verifier, CallerLimits(ServerSettings()), PUBLIC)
    server = grpc.aio.server(interceptors=(status,))
    server.add_generic_rpc_handlers([Guarded(authentication, echo.handlers())])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def mint(subject: str) -> str:
        return mint_token(
            pair.private_key_file,
            issuer=ISSUER,
            audience="postrider",
            subject=subject,
            scopes=("webhooks:manage",),
            merchant_id="m_42",
            lifetime=timedelta(minutes=5),
        )

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(channel, echo, status, keys, mint)
    await server.stop(None)


@pytest.mark.parametrize("method", KINDS)
async def test_caller_with_a_token_reaches_the_handler_as_itself(
    service: Service, method: str
) -> None:
    expected = b"ann" if method == "UnaryUnary" else b"annann"
    assert await service.call(method, service.bearer("ann")) == expected
    assert set(service.echo.reached) == {"ann"}


@pytest.mark.parametrize("method", METHODS)
async def test_caller_without_a_token_reaches_no_handler_and_sends_no_request(
    service: Service, method: str
) -> None:
    assert await service.refusal(method) == NO_TOKEN
    assert service.echo.reached == []
    assert [type(error) for error in service.status.raised] == [Unauthenticated]


async def test_method_that_is_missing_is_told_to_a_known_caller_only(service: Service) -> None:
    refusal = await service.refusal(UNKNOWN, service.bearer("ann"))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED
    assert await service.refusal(UNKNOWN) == await service.refusal("UnaryUnary")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_scheme_is_read_without_regard_to_case(service: Service, scheme: str) -> None:
    metadata = ("authorization", f"{scheme} {service.mint('ann')}")
    assert await service.call("UnaryUnary", metadata) == b"ann"


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "{}", "Basic {}", "Bearer  {}", "Bearer {} {}", "Bearer{}"]
)
async def test_other_authorization_is_refused(service: Service, value: str) -> None:
    token = service.mint("ann")
    metadata = ("authorization", value.format(token, token))
    assert await service.refusal("UnaryUnary", metadata) == NO_TOKEN


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("second", ["ann", "bob"])
async def test_two_tokens_are_one_too_many(service: Service, method: str, second: str) -> None:
    metadata = (service.bearer("ann"), service.bearer(second))
    assert await service.refusal(method, *metadata) == NO_TOKEN
    assert service.echo.reached == []


@pytest.mark.parametrize("method", METHODS)
async def test_refusal_does_not_wait_for_the_request(service: Service, method: str) -> None:
    channel: Any = service.channel
    call = channel.stream_stream(f"/test.Echo/{method}")(timeout=10)
    assert Refusal(await call.code(), await call.details()) == NO_TOKEN


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", UNKNOWN])
async def test_refusal_of_a_large_request_arrives_whole(service: Service, method: str) -> None:
    for _ in range(10):
        assert await service.refusal(method, size=3_000_000) == NO_TOKEN


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer junk"),)])
async def test_public_method_needs_no_token(
    service: Service, metadata: tuple[tuple[str, str], ...]
) -> None:
    assert await service.call("Public", *metadata) == b"anybody"


async def test_public_method_has_no_caller_even_right_after_another_call(service: Service) -> None:
    await service.call("UnaryUnary", service.bearer("ann"))
    assert await service.refusal("PublicByMistake", service.bearer("ann")) == NO_TOKEN
    assert service.echo.reached == ["ann"]


async def test_callers_of_one_moment_are_not_confused(service: Service) -> None:
    names = [f"caller-{number}" for number in range(20) for _ in KINDS]
    answers = await asyncio.gather(
        *(
            service.call(method, service.bearer(name))
            for name, method in zip(names, KINDS * 20, strict=True)
        )
    )
    for name, answer in zip(names, answers, strict=True):
        assert answer in {name.encode(), name.encode() * 2}


@pytest.mark.parametrize("method", KINDS)
async def test_a_caller_known_a_moment_ago_is_known_without_the_keys(
    service: Service, method: str
) -> None:
    bearer = service.bearer("ann")
    first = await service.call(method, bearer)
    service.keys.fault = Unavailable("keys are away", reason="KEYS_UNAVAILABLE")
    assert await service.call(method, bearer) == first
    assert await service.refusal(method, service.bearer("bob")) == (
        grpc.StatusCode.UNAVAILABLE,
        "keys are away",
    )


@pytest.mark.parametrize("method", METHODS)
async def test_keys_that_are_away_make_the_call_unavailable(service: Service, method: str) -> None:
    service.keys.fault = Unavailable("keys are away", reason="KEYS_UNAVAILABLE")
    refusal = await service.refusal(method, service.bearer("ann"))
    assert refusal == (grpc.StatusCode.UNAVAILABLE, "keys are away")


async def test_fault_of_ours_stays_ours_and_lets_nobody_in(service: Service) -> None:
    service.keys.fault = RuntimeError("password=hunter2")
    refusal = await service.refusal("UnaryUnary", service.bearer("ann"))
    assert refusal == (grpc.StatusCode.INTERNAL, "internal error")
    assert service.status.raised == [service.keys.fault]
    assert service.echo.reached == []
