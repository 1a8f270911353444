"""An operator's egress proxy: a real HTTP CONNECT proxy on loopback that resolves names."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

#: Handles a CONNECT instead of the proxy, for example with an invalid response.
type Misbehaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ConnectProxy:
    """Connects known names to ports of loopback. Answers 502 for any other name."""

    def __init__(self) -> None:
        self.port = 0
        self.routes: dict[str, int] = {}
        self.instead: Misbehaviour | None = None
        #: The heads of the received requests.
        self.requests: list[str] = []
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    def url(self, userinfo: str = "") -> str:
        return f"http://{userinfo}127.0.0.1:{self.port}"

    @property
    def targets(self) -> list[str]:
        """The requested targets, as host:port."""
        return [request.split(" ")[1] for request in self.requests]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode("ascii"))
            if self.instead is not None:
                await self.instead(reader, writer)
            else:
                await self._lead_on(reader, writer)
        writer.close()

    async def _lead_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = self.routes.get(self.targets[-1])
        if port is None:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", port)
        self._writers.append(onward)
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: a\r\n\r\n")
        await asyncio.gather(_pass_on(reader, onward), _pass_on(onward_reader, writer))

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def proxying() -> AsyncIterator[ConnectProxy]:
    """A proxy on a free port of loopback."""
    proxy = ConnectProxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.hang_up()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
