"""The receiver of `postrider run` and `demo`, an example of a merchant's receiver.

It listens on HTTPS with a certificate of the local authority and verifies every signature. It
refuses one delivery on purpose, so that the demo shows a retry.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from cli.authority import Authority
from cli.receiver import accepting
from core.signing import ID_HEADER
from postrider_client import VerificationKey, inspect_webhook

PATH = "/webhooks"


@dataclass(frozen=True, slots=True)
class Receipt:
    """A received webhook, and the status of the response."""

    message_id: str
    event_type: str
    attempt: int
    verified: bool
    status: int
    body: bytes


@dataclass
class DemoReceiver:
    """Verifies with `secret`, which is set after the registration."""

    on_receipt: Callable[[Receipt], None]
    port: int = 0
    secret: str = ""
    #: How many new events to refuse at their first attempt.
    refusals_left: int = 0
    receipts: list[Receipt] = field(default_factory=list)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}{PATH}"

    @property
    def accepted_ids(self) -> set[str]:
        """The events with a valid signature that got 200."""
        return {r.message_id for r in self.receipts if r.verified and r.status == 200}

    @property
    def attempts_by_id(self) -> Counter[str]:
        return Counter(r.message_id for r in self.receipts)

    async def wait_for(self, message_ids: set[str], timeout_seconds: float) -> None:
        """Wait until all of these were accepted. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds), self._arrived:
            await self._arrived.wait_for(lambda: message_ids <= self.accepted_ids)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        event_type = request.headers.get("X-Webhook-Event", "")
        if event_type == "webhook.ping":
            return web.Response(text="pong")
        message_id = request.headers.get(ID_HEADER, "")
        keys = [VerificationKey.parse(self.secret)] if self.secret else []
        verified = inspect_webhook(keys, request.headers, body, now=time.time()).valid
        status = 200 if verified else 401
        if verified and self.refusals_left and message_id not in self.attempts_by_id:
            self.refusals_left -= 1
            status = 503
        receipt = Receipt(
            message_id=message_id,
            event_type=event_type,
            attempt=int(request.headers.get("X-Webhook-Attempt", "0")),
            verified=verified,
            status=status,
            body=body,
        )
        async with self._arrived:
            self.receipts.append(receipt)
            self._arrived.notify_all()
        self.on_receipt(receipt)
        return web.Response(status=status)


@asynccontextmanager
async def receiving(
    port: int, authority: Authority, on_receipt: Callable[[Receipt], None]
) -> AsyncIterator[DemoReceiver]:
    """Listen on `port` of loopback with a certificate of `authority`. Port 0 selects a free one."""
    receiver = DemoReceiver(on_receipt)
    tls = authority.server_context(["127.0.0.1"])
    advice = "stop the process that uses it, or set WEBHOOK_RECEIVER_PORT"
    async with accepting(receiver.handle, "127.0.0.1", port, tls, advice) as receiver.port:
        yield receiver
