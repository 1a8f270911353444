"""Stage: tells waiting engines that something is due, soon after a commit and never inside it.

A NOTIFY in the enqueuing transaction would make commits queue up behind each other. Hints of calls
that come together are told as one.
"""

import asyncio

import structlog

from core import queue
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool

#: Hints within this time of each other become one.
_COALESCE_SECONDS = 0.005

log = structlog.get_logger()


class Notifier:
    """Collects hints and sends them from a task of its own."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._wanted = asyncio.Event()

    def give(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        """Send hints until cancelled. A lost one costs latency only: engines poll as well."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await queue.notify(self._pool)
            except RETRYABLE_ERRORS as error:
                log.warning("hint_lost", error=repr(error))
            await asyncio.sleep(_COALESCE_SECONDS)
