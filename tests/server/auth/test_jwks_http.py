"""The issuer's key set over real HTTP, however badly the issuer behaves."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

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
    """URL of an issuer that answers so."""
    app = web.Application()
    app.router.add_get("/jwks", answer)
    app.router.add_get("/elsewhere", document)
    # A handler ends when its client has gone, so that the silent one does.
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    finally:
        await runner.cleanup()


async def document(_request: web.Request) -> web.Response:
    return web.Response(body=DOCUMENT)


async def redirect(_request: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": "/elsewhere"}, body=DOCUMENT)


async def partial(_request: web.Request) -> web.Response:
    return web.Response(status=206, body=DOCUMENT)


async def failing(_request: web.Request) -> web.Response:
    return web.Response(status=503, body=DOCUMENT)


async def too_large(_request: web.Request) -> web.Response:
    return web.Response(body=b" " * (KEY_SET_BYTES_MAX + 1))


async def bomb(_request: web.Request) -> web.Response:
    packed = gzip.compress(b" " * 100_000_000)
    return web.Response(body=packed, headers={"Content-Encoding": "gzip"})


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


async def silent(_request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture
async def fetch() -> AsyncIterator[Fetch]:
    async with key_set_fetch() as fetch:
        yield fetch


async def test_a_key_set_is_fetched_as_it_is(fetch: Fetch) -> None:
    async with issuer(document) as url:
        assert await fetch(url) == DOCUMENT


@pytest.mark.parametrize("answer", [redirect, partial, failing, too_large, bomb, endless])
async def test_no_other_answer_is_a_key_set(fetch: Fetch, answer: Handler) -> None:
    async with issuer(answer) as url:
        with pytest.raises((aiohttp.ClientError, ValueError)):
            await asyncio.wait_for(fetch(url), 10)


@pytest.mark.parametrize("answer", [dripping, silent])
async def test_an_issuer_that_takes_its_time_is_given_up(
    fetch: Fetch, answer: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "FETCH_TIMEOUT_SECONDS", 0.2)
    async with issuer(answer) as url, asyncio.timeout(10):
        with pytest.raises(Unavailable):
            await JwksKeys(url, fetch).keys_for("k")


async def test_no_proxy_of_the_environment_is_asked(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with issuer(document) as url:
        assert await JwksKeys(url, fetch).keys_for("k") == (VerificationKey.of(KEY.public_key()),)
