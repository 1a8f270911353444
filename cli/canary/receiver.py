"""The receiver of a canary. Engines reach it at a public URL or directly."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from cli.receiver import accepting
from core.signing import ID_HEADER
from postrider_client import Inspection, VerificationKey, inspect_webhook

#: Checks one received request with the given keys.
type Inspect = Callable[[Sequence[VerificationKey]], Inspection]


class CanaryReceiver:
    """Stores the webhooks that arrive at the path of this run."""

    def __init__(self, host: str, port: int, public_url: str, tls: ssl.SSLContext | None):
        self._host = host
        self._port = port
        self._public_url = public_url
        self._tls = tls
        self._path = ""
        self._received: dict[str, Inspect] = {}
        self._arrived = asyncio.Condition()

    def url(self, run: str) -> str:
        """Return the URL to register. Other paths belong to earlier canaries."""
        self._path = f"/{run}"
        return f"{self._public_url or f'https://{self._host}:{self._port}'}{self._path}"

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        advice = "stop the process that uses it, or choose another with --listen"
        async with accepting(self._handle, self._host, self._port, self._tls, advice) as self._port:
            yield

    def has(self, message_id: str) -> bool:
        return message_id in self._received

    async def wait_for(self, message_id: str) -> Inspect:
        """Wait until the event arrives, and return the check of its request."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: message_id in self._received)
        return self._received[message_id]

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not self._path or not request.path.endswith(self._path):
            # 410 deactivates the webhook config of a killed canary at once.
            return web.Response(status=410)
        headers, now = dict(request.headers), time.time()
        if request.headers.get("X-Webhook-Event") != "webhook.ping":
            async with self._arrived:
                self._received[headers.get(ID_HEADER, "")] = lambda keys: inspect_webhook(
                    keys, headers, body, now=now
                )
                self._arrived.notify_all()
        return web.Response()
