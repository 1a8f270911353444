"""Between a process and PostgreSQL: passes everything on, and cuts a connection after a commit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

_DATA_ROW, _COMMAND_COMPLETE, _READY_FOR_QUERY, _IDLE = b"D", b"C", b"Z", b"I"
_INT4 = (23).to_bytes(4)


class PostgresProxy:
    """Every `one_in`-th commit of an enqueue is not told to the client: its connection is cut."""

    def __init__(self, upstream: Path) -> None:
        self.one_in = 0
        self.commits = 0
        self.cuts = 0
        self._upstream = upstream

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._upstream)
        with suppress(OSError, asyncio.IncompleteReadError):
            async with asyncio.TaskGroup() as group:
                up = group.create_task(_pass_on(reader, server_writer))
                await self._answer(server_reader, writer)
                up.cancel()
        for ended in (writer, server_writer):
            ended.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass messages on; hold the end of an enqueue until it is known to be committed."""
        held, enqueued = b"", False
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
            if head[:1] == _DATA_ROW and _is_of_enqueue(body):
                enqueued = True
            if head[:1] == _COMMAND_COMPLETE and enqueued:
                held, enqueued = head + body, False
                continue
            if held and head[:1] == _READY_FOR_QUERY and body == _IDLE:
                self.commits += 1
                if self.one_in and self.commits % self.one_in == 0:
                    self.cuts += 1
                    return
            writer.write(held + head + body)
            held = b""


def _is_of_enqueue(row: bytes) -> bool:
    """Whether it is a time and an array of int4, which no other statement answers with."""
    columns, length, elements = row[:2], row[2:6], row[26:30]
    return int.from_bytes(columns) == 2 and int.from_bytes(length) == 8 and elements == _INT4


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.write_eof()


@asynccontextmanager
async def proxied(database_url: str, directory: Path) -> AsyncIterator[tuple[PostgresProxy, str]]:
    """A proxy of the server behind this URL of a socket, and the URL through it."""
    parts = urlsplit(database_url)
    socket = f".s.PGSQL.{parse_qs(parts.query)['port'][0]}"
    proxy = PostgresProxy(Path(parse_qs(parts.query)["host"][0], socket))
    server = await asyncio.start_unix_server(proxy.serve, directory / socket)
    try:
        yield proxy, database_url.replace(parse_qs(parts.query)["host"][0], quote(str(directory)))
    finally:
        server.close()
