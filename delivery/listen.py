"""Stage: waits until there may be deliveries to claim.

A notification of the database wakes the engine quickly, and the poll makes sure. A lost LISTEN
connection is opened again.
"""

import asyncio
from typing import Any

import structlog

from core.postgres.pool import CONNECTION_ERRORS
from core.postgres.protocols import Pool
from core.queue import CHANNEL

_REOPEN_SECONDS = 1.0
#: A retry that is more polls away gets no timer. The poll delays it by a tenth of its wait at most,
#: while timers would be kept for up to a day.
_POLLS_MAX = 10

log = structlog.get_logger()


class Listener:
    """Wakes the engine on a notification, on a retry that becomes due, or after the poll time."""

    def __init__(self, pool: Pool, poll_seconds: float):
        self._pool = pool
        self._poll_seconds = poll_seconds
        self._awake = asyncio.Event()

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

        def on_notify(*_: object) -> None:
            self._awake.set()

        connection.add_termination_listener(on_close)
        try:
            await connection.add_listener(CHANNEL, on_notify)
            await closed.wait()
            raise ConnectionResetError("the LISTEN connection has ended")
        finally:
            # Not reused. It is closed without a goodbye, because an error of the goodbye would hide
            # a cancellation.
            if not closed.is_set():
                connection.remove_termination_listener(on_close)
                connection.terminate()

    def wake_in(self, seconds: float) -> None:
        """Wake the engine after `seconds`. Long waits are left to the poll."""
        if seconds > _POLLS_MAX * self._poll_seconds:
            return
        asyncio.get_running_loop().call_later(seconds, self._awake.set)

    def wake(self) -> None:
        self._awake.set()

    async def wait(self) -> None:
        """Return when there may be work, at the latest after the poll time."""
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._awake.wait()
        except TimeoutError:
            pass
        self._awake.clear()
