"""A receiver with minimal CPU: HTTPS, keep-alive, 200 for every POST.

Run as a process: `python -m benchmarks.receiver PORT CERTIFICATE_FILE [LEDGER_FILE]`. With a ledger
it records requests to `/NUMBER` and `/held`. It responds to `/held` late.
"""

import asyncio
import ssl
import sys
import time
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.ledger import Ledger
from benchmarks.payload import stamp_of

HELD = "held"
HELD_SECONDS = 3.0
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class _Receiver(asyncio.Protocol):
    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's TLS transport behaves like an asyncio.Transport, but is not a subclass.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            start = head.index(b"content-length:") + 15
            length = int(head[start:].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            if self._ledger is None:
                self._transport.write(_ANSWER)
            else:
                self._answer(self._ledger, head, body)

    def _answer(self, ledger: Ledger, head: bytes, body: bytes) -> None:
        received_at = time.time()
        name = head[6 : head.index(b" ", 6)].decode()
        if name == HELD:
            loop = asyncio.get_running_loop()
            loop.call_later(HELD_SECONDS, self._transport.write, _ANSWER)
            ledger.append(0, 0, received_at, received_at)
            return
        self._transport.write(_ANSWER)
        if name.isdecimal():
            sent_at, sequence = stamp_of(body)
            ledger.append(int(name), sequence, sent_at, received_at)


async def _serve(port: int, certificate_file: str, ledger_file: str | None) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate_file)
    ledger = Ledger(Path(ledger_file)) if ledger_file else None
    server = await asyncio.get_running_loop().create_server(
        lambda: _Receiver(ledger), "127.0.0.1", port, ssl=tls, backlog=4096
    )
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
