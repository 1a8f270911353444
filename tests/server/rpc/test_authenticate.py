"""Authentication in a real gRPC server, for all kinds of handlers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import pytest_asyncio

from cli.dev.signing_key import ensure_development_key, mint_token
from core.errors import Unavailable
from server.auth.jwks import PemKeys, VerificationKey
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier, token_refused
from server.rpc.authenticate import Authentication, principal
from server.rpc.call import current_call
from server.settings import ServerSettings
from tests.support.dispatch import dispatching

ISSUER = "https://id.example.com/"
KINDS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "ReadWrite")
UNKNOWN = "Missing"
METHODS = (*KINDS, UNKNOWN)
PUBLIC = frozenset({"/test.Echo/Public", "/test.Echo/PublicByMistake"})


class Echo:
    """Answers every request with the caller's subject and records it in `reached`."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def _subject(self) -> bytes:
        self.reached.append(principal().subject)
        return principal().subject.encode()

    async def unary_unary(self, _request: bytes, _context: Any) -> bytes:
        await asyncio.sleep(0)
        return self._subject()

    async def unary_stream(self, _request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield self._subject()
        await asyncio.sleep(0)
        yield self._subject()

    async def stream_unary(self, requests: AsyncIterator[bytes], _context: Any) -> bytes:
        return b"".join([self._subject() async for _ in requests])

    async def stream_stream(
        self, requests: AsyncIterator[bytes], _context: Any
    ) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield self._subject()

    async def read_write(self, _requests: AsyncIterator[bytes], context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(self._subject())

    async def public(self, _request: bytes, _context: Any) -> bytes:
        return b"anonymous" if current_call().caller is None else self._subject()

    def handlers(self) -> dict[str, Any]:
        return {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream),
            "ReadWrite": grpc.stream_stream_rpc_method_handler(self.read_write),
            "Public": grpc.unary_unary_rpc_method_handler(self.public),
            "PublicByMistake": grpc.stream_stream_rpc_method_handler(self.unary_stream),
        }


class BreakableKeys:
    """The development key, or `fault`."""

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


NO_KEYS = Unavailable("keys are away", reason="KEYS_UNAVAILABLE")
NO_TOKEN = Refusal(grpc.StatusCode.UNAUTHENTICATED, token_refused().message)


@dataclass(frozen=True, slots=True)
class Service:
    """The running server, its parts and a channel to it."""

    channel: Any
    echo: Echo
    keys: BreakableKeys
    mint: Callable[..., str]

    def start(self, method: str, *metadata: tuple[str, str]) -> Any:
        """Start a call without a request. All kinds of calls are the same on the wire."""
        return self.channel.stream_stream(f"/test.Echo/{method}")(metadata=metadata, timeout=10)

    async def call(self, method: str, *metadata: tuple[str, str]) -> bytes:
        """Send two requests of a stream, or one. Returns the joined answers."""
        call = self.start(method, *metadata)
        for _ in range(2 if method in {"StreamUnary", "StreamStream", "ReadWrite"} else 1):
            await call.write(b"x")
        await call.done_writing()
        return b"".join([answer async for answer in call])

    async def refusal(self, method: str, *metadata: tuple[str, str]) -> Refusal:
        """The status of a call that sends no request.

        A grpc.aio client that is writing when the refusal arrives may report INTERNAL
        (grpc/grpc#36066).
        """
        call = self.start(method, *metadata)
        return Refusal(await call.code(), await call.details())

    def bearer(self, subject: str) -> tuple[str, str]:
        return ("authorization", f"Bearer {self.mint(subject=subject)}")


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    pair = ensure_development_key(tmp_path)
    keys = BreakableKeys(PemKeys(pair.public_key_file))
    verifier = TokenVerifier(keys, issuer=ISSUER, audience="postrider", max_lifetime_seconds=3600)
    authentication = Authentication(verifier, CallerLimits(ServerSettings()), PUBLIC)

    mint = partial(
        mint_token,
        pair.private_key_file,
        issuer=ISSUER,
        audience="postrider",
        scopes=("webhooks:manage",),
        merchant_id="m_42",
        lifetime=timedelta(minutes=5),
    )
    echo = Echo()
    async with dispatching(authentication, echo.handlers()) as channel:
        yield Service(channel, echo, keys, mint)


@pytest.mark.parametrize("method", KINDS)
async def test_handler_sees_the_caller_of_the_token(service: Service, method: str) -> None:
    expected = b"ann" if method == "UnaryUnary" else b"annann"
    assert await service.call(method, service.bearer("ann")) == expected
    assert set(service.echo.reached) == {"ann"}


async def test_unknown_method_is_revealed_only_with_a_token(service: Service) -> None:
    refusal = await service.refusal(UNKNOWN, service.bearer("ann"))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED
    assert await service.refusal(UNKNOWN) == await service.refusal("UnaryUnary")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_scheme_is_case_insensitive(service: Service, scheme: str) -> None:
    metadata = ("authorization", f"{scheme} {service.mint(subject='ann')}")
    assert await service.call("UnaryUnary", metadata) == b"ann"


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "{}", "Basic {}", "Bearer  {}", "Bearer {} {}", "Bearer{}"]
)
async def test_malformed_authorization_is_refused(service: Service, value: str) -> None:
    token = service.mint(subject="ann")
    metadata = ("authorization", value.format(token, token))
    assert await service.refusal("UnaryUnary", metadata) == NO_TOKEN


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("second", ["ann", "bob"])
async def test_two_tokens_are_refused(service: Service, method: str, second: str) -> None:
    metadata = (service.bearer("ann"), service.bearer(second))
    assert await service.refusal(method, *metadata) == NO_TOKEN
    assert service.echo.reached == []


@pytest.mark.parametrize("method", METHODS)
async def test_call_without_token_is_refused_before_the_request(
    service: Service, method: str
) -> None:
    assert await service.refusal(method) == NO_TOKEN
    assert service.echo.reached == []


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", UNKNOWN])
async def test_refusal_of_a_large_request_has_its_details(service: Service, method: str) -> None:
    for _ in range(10):
        call = service.channel.unary_unary(f"/test.Echo/{method}")(bytes(3_000_000), timeout=10)
        assert Refusal(await call.code(), await call.details()) == NO_TOKEN


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer junk"),)])
async def test_public_method_needs_no_token(
    service: Service, metadata: tuple[tuple[str, str], ...]
) -> None:
    assert await service.call("Public", *metadata) == b"anonymous"


async def test_public_method_has_no_caller_after_another_call(service: Service) -> None:
    await service.call("UnaryUnary", service.bearer("ann"))
    assert await service.refusal("PublicByMistake", service.bearer("ann")) == NO_TOKEN
    assert service.echo.reached == ["ann"]


async def test_concurrent_calls_keep_their_own_caller(service: Service) -> None:
    async def call(method: str, name: str) -> None:
        answer = await service.call(method, service.bearer(name))
        assert answer in {name.encode(), name.encode() * 2}

    await asyncio.gather(*(call(method, f"caller-{n}") for method in KINDS for n in range(20)))


@pytest.mark.parametrize("method", KINDS)
async def test_recent_token_is_accepted_without_keys(service: Service, method: str) -> None:
    bearer = service.bearer("ann")
    first = await service.call(method, bearer)
    service.keys.fault = NO_KEYS
    assert await service.call(method, bearer) == first


@pytest.mark.parametrize("method", METHODS)
async def test_call_is_unavailable_without_keys(service: Service, method: str) -> None:
    service.keys.fault = NO_KEYS
    refusal = await service.refusal(method, service.bearer("ann"))
    assert refusal == (grpc.StatusCode.UNAVAILABLE, NO_KEYS.message)


async def test_verifier_bug_is_internal_and_refuses_the_call(
    service: Service, logged: list[Any]
) -> None:
    service.keys.fault = RuntimeError("password=hunter2")
    refusal = await service.refusal("UnaryUnary", service.bearer("ann"))
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in refusal.details
    assert [entry.get("exc_info") for entry in logged] == [service.keys.fault, None]
    assert service.echo.reached == []
