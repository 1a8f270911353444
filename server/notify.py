"""Notifies engines of due deliveries after a commit, never inside its transaction.

A NOTIFY inside the enqueuing transaction serialises commits. Notifications of concurrent calls are
coalesced.
"""

import asyncio

import structlog

from core import queue
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool

#: Notifications within this time become one.
_COALESCE_SECONDS = 0.005

log = structlog.get_logger()


class Notifier:
    """Collects notifications. The task `run` sends them."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._requested = asyncio.Event()

    def notify(self) -> None:
        """Request a notification. Call it after the commit."""
        self._requested.set()

    async def run(self) -> None:
        """Send notifications until cancelled. A lost one only adds latency: engines also poll."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            try:
                await queue.notify(self._pool)
            except RETRYABLE_ERRORS as error:
                log.warning("notify_failed", error=repr(error))
            await asyncio.sleep(_COALESCE_SECONDS)
