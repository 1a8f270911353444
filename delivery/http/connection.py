"""One HTTP/1.1 connection to a receiver: writes requests as bytes, reads with aiohttp's parser.

aiohttp's session creates many objects per request, which cost more CPU than TLS. All requests here
have one form, so only aiohttp's pool, its protocol class and its parser in C are used.
tests/delivery/http/test_aiohttp_internals.py checks the undocumented behaviour that this needs.
"""

import asyncio
from time import monotonic

from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from delivery.http.tls_sessions import ResumingTls

#: Bytes that are read ahead before flow control slows the receiver.
_READ_AHEAD_BYTES = 16 * 1024
#: Bytes that are written at a time. TLS copies each piece and keeps a buffer of that size for the
#: lifetime of the connection.
_PIECE_BYTES = 16 * 1024
_HEAD_END = b"\r\n\r\n"
#: Heads per request, 1xx responses included. A receiver that sends more never responds.
_HEADS_MAX = 20


class AnswerWithheldError(HttpProcessingError):
    """The receiver sent 1xx responses without a final one."""


class IdleConnections:
    """The idle connections to all receivers, up to a limit."""

    def __init__(self, limit: int):
        self._limit = limit
        # Ordered by the time when they became idle.
        self._connections: dict[ReceiverConnection, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: "ReceiverConnection") -> None:
        """Add a connection, and close the one that was idle longest above the limit."""
        self._connections[connection] = None
        if len(self._connections) > self._limit:
            oldest = next(iter(self._connections))
            self.discard(oldest)
            oldest.close()

    def discard(self, connection: "ReceiverConnection") -> None:
        """Remove a connection that is used again or closed."""
        self._connections.pop(connection, None)


class ReceiverConnection(ResponseHandler):
    """Speaks HTTP/1.1 to one receiver, one request after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: IdleConnections):
        super().__init__(loop)
        self._idle = idle
        self.made_at = monotonic()
        self.remote_address: str | None = None
        self._tls: ResumingTls | None = None
        self._is_idle = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.remote_address = peer[0] if peer else None
        self._tls = transport.get_extra_info("ssl_object")

    def close(self) -> None:
        """Abort. aiohttp calls this for `Connection: close`.

        An orderly TLS close waits up to 30 s for the receiver, and keeps a file open meanwhile.
        """
        self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._idle.discard(self)
        super().connection_lost(exc)

    async def post(self, head: bytes, payload: bytes) -> tuple[RawResponseMessage, StreamReader]:
        """Send one request; return the head of its response, and the body as it arrives.

        Raises aiohttp's errors of a closed connection, and HttpProcessingError for an invalid or
        missing response.
        """
        self._is_idle = False
        self._idle.discard(self)
        self.set_response_params(
            read_until_eof=True, auto_decompress=False, read_bufsize=_READ_AHEAD_BYTES
        )
        # Without a transport the connection has just ended, and read() raises the error.
        if self.transport is not None:
            _write(self.transport, head, payload)
        for _ in range(_HEADS_MAX):
            message, body = await self.read()
            # 1xx is not final, except 101, which ends HTTP on the connection.
            if not 100 <= message.code < 200 or message.code == 101:
                return message, body
        raise AnswerWithheldError

    def became_idle(self) -> None:
        """Wait for the next request. Data that arrives now would look like its response."""
        self._is_idle = True
        self._idle.add(self)
        if self._tls is not None:
            self._tls.keep_session()
            self._tls = None

    def data_received(self, data: bytes) -> None:
        """Parse each head separately from the data behind it.

        Otherwise an error in the body, such as a short Content-Length, would hide a valid status
        line. Data after the maximum number of heads is not parsed, because one chunk can contain
        thousands of heads.
        """
        if self._is_idle:
            self.abort()
            return
        *heads, remainder = data.split(_HEAD_END, _HEADS_MAX)
        for head in heads:
            super().data_received(head + _HEAD_END)
        if (remainder or not heads) and len(self) < _HEADS_MAX:
            super().data_received(remainder)


def _write(transport: asyncio.WriteTransport, head: bytes, payload: bytes) -> None:
    """Write without a copy of the payload, which would stay in memory for the attempt."""
    transport.write(head + payload[:_PIECE_BYTES])
    remaining = memoryview(payload)[_PIECE_BYTES:]
    while remaining:
        transport.write(remaining[:_PIECE_BYTES])
        remaining = remaining[_PIECE_BYTES:]
