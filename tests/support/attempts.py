"""Sends one attempt to a raw HTTPS receiver."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_network

from yarl import URL

from core.addresses import AddressPolicy
from core.lifecycle import AttemptResult, Outcome
from delivery.http.client import WebhookClient
from delivery.http.request import RequestTemplate, header_lines
from delivery.send import send
from tests.support.raw_receiver import (
    Behaviour,
    RawReceiver,
)

LOOPBACK_ALLOWED = AddressPolicy((ip_network("127.0.0.0/8"),))
#: Seconds. Enough for a response on loopback on a busy machine.
AMPLE = 10.0
HEADERS = header_lines({"Content-Type": "a/b"})
#: Seconds. For receivers that never finish, because the test waits for the timeout.
SHORT = 0.3

#: The `start` fixture.
type Start = Callable[..., AbstractAsyncContextManager[RawReceiver]]


def answering(*parts: bytes, then_close: bool = True) -> Behaviour:
    """A behaviour that writes these bytes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if then_close:
            writer.close()

    return answer


def dripping(head: bytes, drop: bytes, seconds: float = 0.02) -> Behaviour:
    """A behaviour that writes `head`, then `drop` repeatedly."""

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(seconds)

    return drip


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End the connection with a TCP reset."""
    reset_on_close(writer)
    writer.transport.abort()


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    linger = b"\x01\0\0\0\0\0\0\0"
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ok = answering(OK, then_close=False)


async def post(
    client: WebhookClient, url: URL | str, body: bytes = b"{}", seconds: float = AMPLE
) -> AttemptResult:
    return await send(client, RequestTemplate(str(url)), HEADERS, body, seconds)


def summary(result: AttemptResult) -> tuple[Outcome, int | None, str]:
    return result.outcome, result.status_code, result.detail
