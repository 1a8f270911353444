"""A response that a receiver holds back until the test releases it."""

import asyncio
from collections.abc import Mapping

from aiohttp import web

_TIMEOUT_SECONDS = 30.0


class HeldResponse:
    """Responds with `status` after `release`, and counts the concurrent requests.

    Only every `one_in`-th request after the first `after` is held.
    """

    def __init__(
        self,
        status: int = 200,
        *,
        headers: Mapping[str, str] | None = None,
        one_in: int = 1,
        after: int = 0,
    ) -> None:
        self.held = 0
        self.most_held = 0
        self._status = status
        self._headers = headers
        self._one_in = one_in
        self._after = after
        self._seen = 0
        self._released = asyncio.Event()
        self._changed = asyncio.Condition()

    def release(self) -> None:
        self._released.set()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self._seen += 1
        if self._seen > self._after and self._seen % self._one_in == 0:
            async with self._changed:
                self.held += 1
                self.most_held = max(self.most_held, self.held)
                self._changed.notify_all()
            try:
                await self._released.wait()
            finally:
                self.held -= 1
        return web.Response(status=self._status, headers=self._headers)

    async def wait_for(self, count: int) -> None:
        """Wait until this many requests are held."""
        async with asyncio.timeout(_TIMEOUT_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self.held >= count)
