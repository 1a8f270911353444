"""The tie between a supervisor and one engine process: a socket pair, one end each.

The engine says once that it delivers; the supervisor, that it is to stop. In between the supervisor
may ask for the engine's figures. The kernel closes an end with its process, however that died: so
the engine learns that nobody looks after it any more, on every system and without a race, which a
death signal (PR_SET_PDEATHSIG) offers only on Linux and only for the thread that started it.

A stop comes this way and not as a signal, because others signal engines, too: a terminal every
process of its group, systemd every process of a unit. Two signals mean to end at once.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

_READY = b"r"
_STOP = b"s"
_ASK = b"a"
#: Of the length, before an answer.
_LENGTH_BYTES = 4
#: An engine that is frozen keeps nobody waiting; a reading of the database takes up to 2 s.
_ANSWER_SECONDS = 3.0

log = structlog.get_logger()


class SupervisorEnd:
    """The supervisor's end; `theirs` is for the engine to inherit."""

    def __init__(self) -> None:
        self._socket, self.theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._asking: asyncio.Task[bytes | None] | None = None

    async def engine_delivers(self) -> bool:
        """Wait until it does; False when it ended before."""
        with suppress(ConnectionResetError):
            return await self._receive(1) == _READY
        return False

    async def ask(self) -> bytes | None:
        """What the engine answers; None when it has ended, or does not answer in time.

        Only once it delivers.
        """
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        asking = self._asking
        # An answer that comes too late is read all the same, or it would be taken for the next.
        done, _ = await asyncio.wait({asking}, timeout=_ANSWER_SECONDS)
        return asking.result() if done and not asking.cancelled() else None

    def stop(self) -> None:
        _say(self._socket, _STOP)

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._socket.close()

    async def _ask(self) -> bytes | None:
        try:
            _say(self._socket, _ASK)
            length = int.from_bytes(await self._receive(_LENGTH_BYTES))
            return await self._receive(length) or None
        except OSError:
            return None
        finally:
            self._asking = None

    async def _receive(self, count: int) -> bytes:
        """So many bytes; fewer when the engine has ended."""
        received = bytearray()
        while len(received) < count:
            part = await asyncio.get_running_loop().sock_recv(self._socket, count - len(received))
            if not part:
                break
            received += part
        return bytes(received)


class EngineEnd:
    """The engine's end; `descriptor` is inherited from the supervisor."""

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        #: What to say when the supervisor asks; set before it is told that the engine delivers.
        self.answer: Callable[[], Awaitable[bytes]] | None = None
        self._answering: asyncio.Task[None] | None = None

    def pass_stop_on(self, stop: asyncio.Event) -> None:
        """Set `stop` when the supervisor says so or is gone; the engine then drains and ends."""
        loop = asyncio.get_running_loop()

        def on_word() -> None:
            word = self._hear()
            if word == _ASK:
                # One at a time: the next is asked when this one is answered.
                self._answering = loop.create_task(self._tell())
                return
            if word != _STOP:
                loop.remove_reader(self._socket)
                if not stop.is_set():
                    log.warning("supervisor_gone")
            stop.set()

        loop.add_reader(self._socket, on_word)

    def _hear(self) -> bytes:
        try:
            return self._socket.recv(1)
        except OSError:
            # It went with an answer unread.
            return b""

    async def _tell(self) -> None:
        answer = b"" if self.answer is None else await self.answer()
        with suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(
                self._socket, len(answer).to_bytes(_LENGTH_BYTES) + answer
            )

    def say_ready(self) -> None:
        _say(self._socket, _READY)


def _say(end: socket.socket, word: bytes) -> None:
    # Who is at the other end may be gone, and whoever reads there learns of it.
    with suppress(OSError):
        end.send(word)
