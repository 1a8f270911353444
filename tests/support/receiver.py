"""A merchant's endpoint: a real HTTPS server with scripted answers that records its requests."""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trustme
from aiohttp import web


@dataclass(frozen=True, slots=True)
class Received:
    """A received request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def is_ping(self) -> bool:
        return self.headers.get("X-Webhook-Event") == "webhook.ping"


type Answer = int | web.StreamResponse | Callable[[web.Request], Awaitable[web.StreamResponse]]


class Receiver:
    """Answers each request with the next entry of `script`, and then `default`. Pings get 200."""

    def __init__(self) -> None:
        self.port = 0
        self.default: Answer = 200
        self.script: deque[Answer] = deque()
        self.requests: list[Received] = []
        self._arrived = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/hook"

    @property
    def webhooks(self) -> list[Received]:
        """All received requests except pings."""
        return [request for request in self.requests if not request.is_ping]

    @property
    def message_ids(self) -> list[str]:
        """The `webhook-id` of every webhook, in the order of arrival."""
        return [request.message_id for request in self.webhooks]

    async def wait_for(self, count: int, timeout: float = 20) -> Sequence[Received]:
        """Wait for at least `count` webhooks. Returns all."""
        async with asyncio.timeout(timeout), self._arrived:
            await self._arrived.wait_for(lambda: len(self.webhooks) >= count)
        return self.webhooks

    async def handle(self, request: web.Request) -> web.StreamResponse:
        received = Received(request.path_qs, dict(request.headers), await request.read())
        async with self._arrived:
            self.requests.append(received)
            self._arrived.notify_all()
        if received.is_ping:
            return web.Response(status=200)
        answer = self.script.popleft() if self.script else self.default
        if isinstance(answer, int):
            return web.Response(status=answer)
        if isinstance(answer, web.StreamResponse):
            return answer
        return await answer(request)


@asynccontextmanager
async def receiving(authority: trustme.CA) -> AsyncIterator[Receiver]:
    """A receiver on a free port of loopback, with a certificate of `authority`."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(tls)
    receiver = Receiver()
    app = web.Application(client_max_size=2**21)
    app.router.add_route("*", "/{tail:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()
