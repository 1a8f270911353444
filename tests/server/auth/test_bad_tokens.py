"""All bad tokens get the same answer over the wire, so that it reveals nothing."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier, token_refused
from server.rpc.authenticate import Authentication
from server.settings import ServerSettings
from tests.server.auth.test_tokens import (
    AUDIENCE,
    BAD_TOKENS,
    ISSUER,
    LIFETIME,
    NOW,
    FakeKeys,
    with_claims,
)
from tests.support.clock import ManualClock
from tests.support.dispatch import dispatching
from tests.support.platform import Metadata, bearer
from tests.support.refused_calls import Refusal, refusal_of

#: The other tokens do not fit into metadata, so no client can send them.
SENDABLE = {
    name: token
    for name, token in BAD_TOKENS.items()
    if token.isascii() and token.isprintable() and len(token) < 8000
}
REFUSAL = Refusal(StatusCode.UNAUTHENTICATED, token_refused().message, "TOKEN_INVALID")


@pytest.fixture
async def call() -> AsyncIterator[Any]:
    """Calls a server that accepts the tokens of test_tokens at their time."""
    verifier = TokenVerifier(
        FakeKeys(),
        issuer=ISSUER,
        audience=AUDIENCE,
        max_lifetime_seconds=LIFETIME,
        clock=ManualClock(NOW),
    )
    authentication = Authentication(verifier, CallerLimits(ServerSettings()))
    options = [("grpc.max_metadata_size", 16_384), ("grpc.absolute_max_metadata_size", 32_768)]

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    handlers: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    async with dispatching(authentication, handlers, options) as channel:
        stub: Any = channel.unary_unary("/test.Echo/Echo")
        yield lambda metadata: stub(b"x", metadata=metadata, timeout=10)


async def test_every_bad_token_has_the_same_answer(call: Any) -> None:
    assert len(SENDABLE) >= 80
    assert await call(bearer(with_claims())) == b"x"
    for name, token in SENDABLE.items():
        assert await refusal_of(call(bearer(token))) == REFUSAL, name


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization-bin", with_claims().encode())],
        [("cookie", f"authorization=Bearer {with_claims()}")],
        [("x-forwarded-authorization", f"Bearer {with_claims()}")],
    ],
    ids=["binary", "cookie", "forwarded"],
)
async def test_token_in_other_metadata_does_not_count(call: Any, metadata: Metadata) -> None:
    assert await refusal_of(call(metadata)) == REFUSAL
