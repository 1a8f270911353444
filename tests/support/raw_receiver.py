"""A receiver that handles requests as bytes, so that it can break HTTP."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trustme
from yarl import URL

#: Handles a complete request, for example with an invalid response.
type Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawReceiver:
    """Reads requests on each connection and handles each with the next entry of `script`.

    After the last one, or when a behaviour closes its writer, the connection is closed.
    """

    def __init__(self, *script: Behaviour) -> None:
        self.script = list(script)
        self.port = 0
        self.connections = 0
        self.requests: list[bytes] = []
        #: Set when a connection has ended, from either side.
        self.ended = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> URL:
        return URL(f"https://127.0.0.1:{self.port}/hook", encoded=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing() and self.script:
                self.requests.append(await read_request(reader))
                await self.script.pop(0)(reader, writer)
        writer.close()
        self.ended.set()


@asynccontextmanager
async def receiving_raw(
    receiver: RawReceiver, tls: ssl.SSLContext | None
) -> AsyncIterator[RawReceiver]:
    """Serve on a free port of loopback, in plain text if `tls` is None."""
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for writer in receiver.writers:
            writer.transport.abort()


def server_tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(tls)
    return tls


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request in bytes: head, empty line, body."""
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(header(head, "content-length") or 0))


def header(request: bytes, name: str) -> str | None:
    """The single value of a header, or None."""
    head = request.partition(b"\r\n\r\n")[0].decode("latin-1")
    values = [
        value.strip()
        for key, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
        if key.lower() == name.lower()
    ]
    assert len(values) <= 1, f"{name} came {len(values)} times"
    return values[0] if values else None
