"""A merchant's endpoint that answers each request in the same way, including pings."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trustme
from aiohttp import web

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class HeldUp:
    """The test sets `answer`. The endpoint sets the others when a request arrives or is aborted."""

    url: str = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    answer: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def answering(
    authority: trustme.CA, status: int, headers: Mapping[str, str] | None = None
) -> AsyncIterator[str]:
    """The URL of an endpoint that always answers `status`."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers=headers)

    async with _serving(authority, answer) as url:
        yield url


@asynccontextmanager
async def held_up(authority: trustme.CA) -> AsyncIterator[HeldUp]:
    """An endpoint that answers only after the test sets `answer`."""
    endpoint = HeldUp()

    async def answer(_request: web.Request) -> web.Response:
        endpoint.asked.set()
        try:
            await endpoint.answer.wait()
        except asyncio.CancelledError:
            endpoint.given_up.set()
            raise
        return web.Response()

    async with _serving(authority, answer) as endpoint.url:
        try:
            yield endpoint
        finally:
            endpoint.answer.set()


@asynccontextmanager
async def _serving(authority: trustme.CA, answer: Handler) -> AsyncIterator[str]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(tls)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}/hook"
    finally:
        await runner.cleanup()
