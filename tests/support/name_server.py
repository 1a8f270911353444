"""A name server on loopback that answers, denies or ignores queries."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import cast

_TYPES = {4: 1, 6: 28}
_ANSWERED, _NO_SUCH_NAME = 0x8180, 0x8183


class FakeNameServer(asyncio.DatagramProtocol):
    """A minimal RFC 1035 server over UDP. It ignores queries for names under `silent`."""

    def __init__(self, known: dict[str, list[str]], silent: str = "silent.example"):
        self.known = known
        self.silent = silent
        #: With 0, resolvers do not cache the answer.
        self.ttl = 0
        self.address = ""
        #: The queried names, once for A and once for AAAA.
        self.asked: list[str] = []
        self._was_asked = asyncio.Event()

    async def wait_until_asked(self, count: int) -> None:
        """Wait until this many queries have arrived."""
        while len(self.asked) < count:
            self._was_asked.clear()
            await self._was_asked.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transport of uvloop has the methods but not the type.
        self._transport = cast(asyncio.DatagramTransport, transport)
        host, port = transport.get_extra_info("sockname")
        self.address = f"{host}:{port}"

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        labels, end = [], 12
        while length := data[end]:
            labels.append(data[end + 1 : end + 1 + length].decode())
            end += 1 + length
        name = ".".join(labels)
        self.asked.append(name)
        self._was_asked.set()
        if name.endswith(self.silent):
            return
        [kind] = struct.unpack_from(">H", data, end + 1)
        addresses = [ip_address(text) for text in self.known.get(name, [])]
        records = [
            # A pointer to the name in the question.
            struct.pack(">HHHIH", 0xC00C, kind, 1, self.ttl, len(address.packed)) + address.packed
            for address in addresses
            if _TYPES[address.version] == kind
        ]
        flags = _ANSWERED if addresses else _NO_SUCH_NAME
        head = data[:2] + struct.pack(">HHHHH", flags, 1, len(records), 0, 0)
        self._transport.sendto(head + data[12 : end + 5] + b"".join(records), peer)


@asynccontextmanager
async def serving_names(known: dict[str, list[str]]) -> AsyncIterator[FakeNameServer]:
    """Serve on a free port of loopback."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: FakeNameServer(known), local_addr=("127.0.0.1", 0), family=socket.AF_INET
    )
    try:
        yield server
    finally:
        transport.close()
