"""The socket pair between the supervisor and an engine process.

The engine reports once that it delivers. The supervisor requests metrics, and requests the stop.
The kernel closes the socket of a process that dies, so that the engine drains after the death of
its supervisor. Unlike PR_SET_PDEATHSIG this works on every system, without a race.

A stop is not a signal, because terminals signal every process of their group, and systemd every
process of a unit. A second signal would end the engine at once.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

_READY = b"r"
_STOP = b"s"
_GET_METRICS = b"a"
#: Bytes of the length that precedes a response.
_LENGTH_BYTES = 4
#: Limits the wait for a frozen engine. Reading the database stats takes up to 2 s.
_RESPONSE_SECONDS = 3.0

log = structlog.get_logger()


class SupervisorEnd:
    """The supervisor's end. The engine inherits `engine_socket`."""

    def __init__(self) -> None:
        self._socket, self.engine_socket = socket.socketpair()
        self._socket.setblocking(False)
        self._asking: asyncio.Task[bytes | None] | None = None

    async def engine_delivers(self) -> bool:
        """Wait until the engine delivers. Returns False if it ended before."""
        with suppress(ConnectionResetError):
            return await self._receive(1) == _READY
        return False

    async def ask(self) -> bytes | None:
        """Request the metrics of a delivering engine. Returns None without a response in time."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        asking = self._asking
        # A late response is still read, because it would look like the next one.
        done, _ = await asyncio.wait({asking}, timeout=_RESPONSE_SECONDS)
        return asking.result() if done and not asking.cancelled() else None

    def stop(self) -> None:
        _send(self._socket, _STOP)

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._socket.close()

    async def _ask(self) -> bytes | None:
        try:
            _send(self._socket, _GET_METRICS)
            length = int.from_bytes(await self._receive(_LENGTH_BYTES))
            return await self._receive(length) or None
        except OSError:
            return None
        finally:
            self._asking = None

    async def _receive(self, count: int) -> bytes:
        """Return `count` bytes, or fewer if the engine has ended."""
        received = bytearray()
        while len(received) < count:
            part = await asyncio.get_running_loop().sock_recv(self._socket, count - len(received))
            if not part:
                break
            received += part
        return bytes(received)


class EngineEnd:
    """The engine's end. `descriptor` is inherited from the supervisor."""

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        #: Returns the metrics. Set before report_ready().
        self.read_metrics: Callable[[], Awaitable[bytes]] | None = None
        self._responding: asyncio.Task[None] | None = None

    def forward_stop(self, stop: asyncio.Event) -> None:
        """Set `stop` when the supervisor requests it or is gone, so that the engine drains."""
        loop = asyncio.get_running_loop()

        def on_message() -> None:
            message = self._receive()
            if message == _GET_METRICS:
                # The supervisor sends one request at a time.
                self._responding = loop.create_task(self._respond())
                return
            if message != _STOP:
                loop.remove_reader(self._socket)
                if not stop.is_set():
                    log.warning("supervisor_gone")
            stop.set()

        loop.add_reader(self._socket, on_message)

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1)
        except OSError:
            # The supervisor died with an unread response.
            return b""

    async def _respond(self) -> None:
        answer = b"" if self.read_metrics is None else await self.read_metrics()
        with suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(
                self._socket, len(answer).to_bytes(_LENGTH_BYTES) + answer
            )

    def report_ready(self) -> None:
        _send(self._socket, _READY)


def _send(end: socket.socket, message: bytes) -> None:
    # The other end may be gone, which the reader of this end notices.
    with suppress(OSError):
        end.send(message)
