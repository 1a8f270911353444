"""The tie between a supervisor and one engine process: a socket pair, one end each.

The engine says once that it delivers; the supervisor, that it is to stop. The kernel closes an end
with its process, however that died: so the engine learns that nobody looks after it any more, on
every system and without a race, which a death signal (PR_SET_PDEATHSIG) offers only on Linux and
only for the thread that started it.

A stop comes this way and not as a signal, because others signal engines, too: a terminal every
process of its group, systemd every process of a unit. Two signals mean to end at once.
"""

import asyncio
import socket
from contextlib import suppress

import structlog

_READY = b"r"
_STOP = b"s"

log = structlog.get_logger()


class SupervisorEnd:
    """The supervisor's end; `theirs` is for the engine to inherit."""

    def __init__(self) -> None:
        self._socket, self.theirs = socket.socketpair()
        self._socket.setblocking(False)

    async def engine_delivers(self) -> bool:
        """Wait until it does; False when it ended before."""
        with suppress(ConnectionResetError):
            return await asyncio.get_running_loop().sock_recv(self._socket, 1) == _READY
        return False

    def stop(self) -> None:
        _say(self._socket, _STOP)

    def close(self) -> None:
        self._socket.close()


class EngineEnd:
    """The engine's end; `descriptor` is inherited from the supervisor."""

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)

    def pass_stop_on(self, stop: asyncio.Event) -> None:
        """Set `stop` when the supervisor says so or is gone; the engine then drains and ends."""
        loop = asyncio.get_running_loop()

        def on_word() -> None:
            loop.remove_reader(self._socket)
            if self._socket.recv(1) != _STOP:
                log.warning("supervisor_gone")
            stop.set()

        loop.add_reader(self._socket, on_word)

    def say_ready(self) -> None:
        _say(self._socket, _READY)


def _say(end: socket.socket, word: bytes) -> None:
    # Who is at the other end may be gone, and whoever reads there learns of it.
    with suppress(OSError):
        end.send(word)
