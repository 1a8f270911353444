"""Stage: waits until there may be something to claim.

A hint from the database is the quick way; the poll is the sure one. A listening connection that
died is noticed by nothing but its end, so it is opened anew whenever it is gone.
"""

import asyncio
from typing import Any

import structlog

from core.postgres.pool import CONNECTION_ERRORS
from core.postgres.protocols import Pool
from core.queue import CHANNEL

_REOPEN_SECONDS = 1.0
#: A wait of more polls than this is left to the polls: a timer for each retry would be kept for as
#: long as a day, and what it gains is a tenth of the wait at most.
_POLLS_MAX = 10

log = structlog.get_logger()


class Listener:
    """Wakes the engine on a hint, on a retry of our own that falls due, or after the poll time."""

    def __init__(self, pool: Pool, poll_seconds: float):
        self._pool = pool
        self._poll_seconds = poll_seconds
        self._hinted = asyncio.Event()

    async def run(self) -> None:
        """Hold a LISTEN connection until cancelled."""
        while True:
            try:
                async with self._pool.acquire() as connection:
                    await self._hold(connection)
            except CONNECTION_ERRORS as error:
                log.warning("listen_reopened", error=repr(error))
            await asyncio.sleep(_REOPEN_SECONDS)

    async def _hold(self, connection: Any) -> None:
        closed = asyncio.Event()

        def on_close(_: object) -> None:
            closed.set()

        def on_hint(*_: object) -> None:
            self._hinted.set()

        connection.add_termination_listener(on_close)
        try:
            await connection.add_listener(CHANNEL, on_hint)
            await closed.wait()
            raise ConnectionResetError("the connection that listens for hints has ended")
        finally:
            # Never given back for other use. At once and without a word to the server: a farewell
            # that fails would hide that we are being cancelled.
            if not closed.is_set():
                connection.remove_termination_listener(on_close)
                connection.terminate()

    def expect_retry(self, seconds: float) -> None:
        """Wake up in time for a retry that this engine scheduled; a late one is for the poll."""
        if seconds > _POLLS_MAX * self._poll_seconds:
            return
        asyncio.get_running_loop().call_later(seconds, self._hinted.set)

    def wake(self) -> None:
        self._hinted.set()

    async def wait(self) -> None:
        """Return when there may be work; at the latest after the poll time."""
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._hinted.wait()
        except TimeoutError:
            pass
        self._hinted.clear()
