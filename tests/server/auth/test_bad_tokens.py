"""The table of bad tokens over the wire: one answer to all of them, and it tells nothing."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from core.logs import SuccessSampling
from core.settings import LogSettings
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier, token_refused
from server.metrics import ServerMetrics
from server.rpc.audit_refusals import RefusalAudit
from server.rpc.authenticate import Authentication
from server.rpc.call import current_call
from server.rpc.dispatch import Calls
from server.rpc.report import RpcReports
from server.settings import ServerSettings
from tests.server.auth.test_tokens import (
    AUDIENCE,
    BAD_TOKENS,
    ISSUER,
    LIFETIME,
    FakeClock,
    FakeKeys,
    with_claims,
)
from tests.support.platform import Metadata, bearer
from tests.support.refused_calls import Refusal, refusal_of

#: Metadata cannot carry the others, so no client can send them.
SENDABLE = {
    name: token
    for name, token in BAD_TOKENS.items()
    if token.isascii() and token.isprintable() and len(token) < 8000
}
REFUSAL = Refusal(StatusCode.UNAUTHENTICATED, token_refused().message, "TOKEN_INVALID")


class NobodyIsKnown(RefusalAudit):
    """In place of the audit log, which strangers must not write to."""

    def __init__(self) -> None:
        pass

    async def record(self, *_: object) -> None:
        assert current_call().caller is None


@pytest.fixture
async def call() -> AsyncIterator[Any]:
    """Calls a server that takes the tokens of test_tokens at their time."""
    verifier = TokenVerifier(
        FakeKeys(),
        issuer=ISSUER,
        audience=AUDIENCE,
        max_lifetime_seconds=LIFETIME,
        clock=FakeClock(),
    )
    authentication = Authentication(verifier, CallerLimits(ServerSettings()))
    options = [("grpc.max_metadata_size", 16_384), ("grpc.absolute_max_metadata_size", 32_768)]
    reports = RpcReports(ServerMetrics({}), SuccessSampling(LogSettings()))
    server = grpc.aio.server(options=options)

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    services = [grpc.method_handlers_generic_handler("test.Echo", handlers)]
    server.add_generic_rpc_handlers([Calls(services, authentication, NobodyIsKnown(), reports)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        stub: Any = channel.unary_unary("/test.Echo/Echo")

        def start(metadata: Metadata) -> Any:
            return stub(b"x", metadata=metadata, timeout=10)

        yield start
    await server.stop(None)


async def test_every_bad_token_has_the_same_answer(call: Any) -> None:
    assert len(SENDABLE) >= 80
    assert await call(bearer(with_claims())) == b"x"
    for name, token in SENDABLE.items():
        assert await refusal_of(call(bearer(token))) == REFUSAL, name


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", f"Basic {with_claims()}")],
        [*bearer(with_claims()), *bearer(with_claims())],
        [*bearer(with_claims()), *bearer("junk")],
        [("authorization-bin", with_claims().encode())],
        [("cookie", f"authorization=Bearer {with_claims()}")],
        [("x-forwarded-authorization", f"Bearer {with_claims()}")],
    ],
    ids=["none", "empty", "Basic", "twice", "two", "binary", "cookie", "forwarded"],
)
async def test_a_good_token_in_a_wrong_place_is_none(call: Any, metadata: Metadata) -> None:
    assert await refusal_of(call(metadata)) == REFUSAL
