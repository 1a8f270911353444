"""One connection to a receiver: requests out in one piece, answers in through aiohttp's parser.

aiohttp's session makes objects of everything about a request, which costs more than TLS does. All
our requests look the same, so they are written as bytes, and of aiohttp there remain the pool, the
handler under this class, and its parser in C. tests/delivery/http/test_aiohttp_internals.py checks
the behaviour that we rely on and its documentation does not promise.
"""

import asyncio
from time import monotonic

from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from delivery.http.tls_sessions import ResumingTls

#: What is read ahead of us before the receiver is held back.
_READ_AHEAD_BYTES = 16 * 1024
#: So much of a request is written at a time. What TLS is given in one piece it copies in one piece,
#: and keeps the room for as long as the connection lasts.
_PIECE_BYTES = 16 * 1024
_HEAD_END = b"\r\n\r\n"
#: So many heads may come to one request, 1xx and the answer: whoever sends more never comes to it.
_HEADS_MAX = 20


class AnswerWithheldError(HttpProcessingError):
    """One 1xx came after another, and no answer."""


class Resting:
    """The connections that wait for their next request: at most so many, of whatever receivers."""

    def __init__(self, most: int):
        self._most = most
        # In the order in which they came to rest.
        self._connections: dict[ReceiverConnection, None] = {}

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: "ReceiverConnection") -> None:
        """One more; where that is one too many, the one that has rested longest is ended."""
        self._connections[connection] = None
        if len(self._connections) > self._most:
            oldest = next(iter(self._connections))
            self.discard(oldest)
            oldest.close()

    def discard(self, connection: "ReceiverConnection") -> None:
        """It is in use again, or has ended."""
        self._connections.pop(connection, None)


class ReceiverConnection(ResponseHandler):
    """Speaks HTTP/1.1 to one receiver, one request after another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, among: Resting):
        super().__init__(loop)
        self._among = among
        self.made_at = monotonic()
        self.remote_address: str | None = None
        self._tls: ResumingTls | None = None
        self._resting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.remote_address = peer[0] if peer else None
        self._tls = transport.get_extra_info("ssl_object")

    def close(self) -> None:
        """At once, whoever wants it: aiohttp, too, when an answer says `Connection: close`.

        In good order TLS waits up to 30 s for a farewell of the receiver, which would keep a file
        open for each of its answers.
        """
        self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._among.discard(self)
        super().connection_lost(exc)

    async def post(self, head: bytes, payload: bytes) -> tuple[RawResponseMessage, StreamReader]:
        """Send one request and return the head of its answer, and its body as it comes.

        Raises aiohttp's errors of a connection that ended, and HttpProcessingError for what is not
        HTTP, or never comes to an answer.
        """
        self._resting = False
        self._among.discard(self)
        self.set_response_params(
            read_until_eof=True, auto_decompress=False, read_bufsize=_READ_AHEAD_BYTES
        )
        # Without a transport the connection ended just now, and read() tells how.
        if self.transport is not None:
            _write(self.transport, head, payload)
        for _ in range(_HEADS_MAX):
            message, body = await self.read()
            # 1xx are no answer yet, but for 101, which is the last thing said in HTTP.
            if not 100 <= message.code < 200 or message.code == 101:
                return message, body
        raise AnswerWithheldError

    def rest(self) -> None:
        """Between two requests nothing may come: it would be taken for the next one's answer."""
        self._resting = True
        self._among.add(self)
        if self._tls is not None:
            self._tls.keep_session()
            self._tls = None

    def data_received(self, data: bytes) -> None:
        """Parse the head of an answer apart from what came with it in one piece.

        Otherwise a fault in the body, such as a Content-Length that is too short, takes with it the
        status line that was fine. And what follows more heads than may come is not parsed at all:
        there is room for thousands of them in what arrives at once.
        """
        if self._resting:
            self.abort()
            return
        *heads, rest = data.split(_HEAD_END, _HEADS_MAX)
        for head in heads:
            super().data_received(head + _HEAD_END)
        if (rest or not heads) and len(self) < _HEADS_MAX:
            super().data_received(rest)


def _write(transport: asyncio.WriteTransport, head: bytes, payload: bytes) -> None:
    """Without a copy of the payload, which would last as long as the attempt."""
    transport.write(head + payload[:_PIECE_BYTES])
    rest = memoryview(payload)[_PIECE_BYTES:]
    while rest:
        transport.write(rest[:_PIECE_BYTES])
        rest = rest[_PIECE_BYTES:]
