"""A receiver's answer that waits, so that a test decides when requests end."""

import asyncio
from collections.abc import Mapping

from aiohttp import web

_TIMEOUT_SECONDS = 30.0


class Gate:
    """Answers `status` once the gate is open, and counts the requests that wait at once.

    Only every `one_in`-th request after the first `after` waits. The others are answered at once.
    """

    def __init__(
        self,
        status: int = 200,
        *,
        headers: Mapping[str, str] | None = None,
        one_in: int = 1,
        after: int = 0,
    ) -> None:
        self.waiting = 0
        self.most_waiting = 0
        self._status = status
        self._headers = headers
        self._one_in = one_in
        self._after = after
        self._seen = 0
        self._opened = asyncio.Event()
        self._changed = asyncio.Condition()

    def open(self) -> None:
        self._opened.set()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self._seen += 1
        if self._seen > self._after and self._seen % self._one_in == 0:
            async with self._changed:
                self.waiting += 1
                self.most_waiting = max(self.most_waiting, self.waiting)
                self._changed.notify_all()
            try:
                await self._opened.wait()
            finally:
                self.waiting -= 1
        return web.Response(status=self._status, headers=self._headers)

    async def wait_for(self, count: int) -> None:
        """Return once so many requests wait at the same time."""
        async with asyncio.timeout(_TIMEOUT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self.waiting >= count)
