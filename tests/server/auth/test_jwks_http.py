"""Fetching the issuer's key set over real HTTP, also from an issuer that misbehaves."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jwt.algorithms
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cli.process.jwks_fetch import KEY_SET_BYTES_MAX, key_set_fetch
from core.errors import Unavailable
from server.auth import jwks as keys_module
from server.auth.jwks import JwksKeys, VerificationKey

type Fetch = Callable[[str], Awaitable[bytes]]
type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = Ed25519PrivateKey.generate()
JWK = jwt.algorithms.OKPAlgorithm.to_jwk(KEY.public_key(), as_dict=True) | {"kid": "k"}
DOCUMENT = json.dumps({"keys": [JWK]}).encode()


@asynccontextmanager
async def issuer(answer: Handler) -> AsyncIterator[str]:
    """The URL of an issuer with this handler."""
    app = web.Application()
    app.router.add_get("/jwks", answer)
    app.router.add_get("/elsewhere", document)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    finally:
        await runner.cleanup()


def returning(**response: Any) -> Handler:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(**{"body": DOCUMENT} | response)

    return answer


document = returning()
INVALID = {
    "redirect": returning(status=302, headers={"Location": "/elsewhere"}),
    "partial": returning(status=206),
    "failing": returning(status=503),
    "too large": returning(body=b" " * (KEY_SET_BYTES_MAX + 1)),
    "bomb": returning(body=gzip.compress(b" " * 100_000_000), headers={"Content-Encoding": "gzip"}),
}


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65_536)


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


@pytest.fixture
async def fetch() -> AsyncIterator[Fetch]:
    async with key_set_fetch() as fetch:
        yield fetch


async def test_key_set_is_fetched(fetch: Fetch) -> None:
    async with issuer(document) as url:
        assert await fetch(url) == DOCUMENT


@pytest.mark.parametrize("answer", [*INVALID.values(), endless], ids=[*INVALID, "endless"])
async def test_invalid_response_is_refused(fetch: Fetch, answer: Handler) -> None:
    async with issuer(answer) as url:
        with pytest.raises((aiohttp.ClientError, ValueError)):
            await asyncio.wait_for(fetch(url), 10)


async def test_slow_issuer_times_out(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "FETCH_TIMEOUT_SECONDS", 0.2)
    async with issuer(dripping) as url, asyncio.timeout(10):
        with pytest.raises(Unavailable):
            await JwksKeys(url, fetch).keys_for("k")


async def test_proxy_of_the_environment_is_ignored(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with issuer(document) as url:
        assert await JwksKeys(url, fetch).keys_for("k") == (VerificationKey.of(KEY.public_key()),)
