"""Commits the batches of a stream at once and acknowledges them in the order they came.

At most so many batches are taken and not acknowledged; before one of them is, nothing more is read,
and the transport's flow control holds the sender back. Whatever ends a stream, what was taken
before it is acknowledged first.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class Turns:
    """One at a time, in the order in which they ask; once one has failed, nobody any more."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._failure: BaseException | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Raises what an earlier turn failed with: what it left out must not be overtaken."""
        async with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                yield
            except BaseException as error:
                self._failure = error
                raise


class OrderedCommits[Batch, Ack]:
    """One stream; `commit` checks a batch when it is called and stores it when it is awaited."""

    def __init__(
        self, commit: Callable[[Batch], Coroutine[Any, Any, Ack]], unacknowledged_max: int
    ):
        self._commit = commit
        self._budget = asyncio.Semaphore(unacknowledged_max)
        # None: nothing comes after it.
        self._taken: asyncio.Queue[asyncio.Task[Ack] | None] = asyncio.Queue()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Take no more; what was taken is acknowledged, then `error` is raised if there is one."""
        if not self._ended:
            self._ended, self._error = True, error
            self._taken.put_nowait(None)

    async def acknowledge(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[Ack]:
        """The acknowledgement of each batch, until the last one or the first that fails."""
        self._reading = asyncio.create_task(self._read(batches))
        try:
            while (committing := await self._taken.get()) is not None:
                yield await committing
                self._budget.release()
        finally:
            self.end()
            await self._abandon()
        if self._error is not None:
            raise self._error

    async def _read(self, batches: AsyncIterator[Batch]) -> None:
        try:
            await self._budget.acquire()
            async for batch in batches:
                if self._ended:
                    return
                self._taken.put_nowait(asyncio.create_task(self._commit(batch)))
                if not await self._may_read():
                    return
        except Exception as error:
            self.end(error)
        finally:
            self.end()

    async def _may_read(self) -> bool:
        await self._budget.acquire()
        return not self._ended

    async def _abandon(self) -> None:
        """Give up what is left after a failure. The read goes on until the call is over.

        gRPC's read must not be cancelled before its call, and ends by itself with it.
        """
        self._budget.release()
        left = []
        while not self._taken.empty():
            if (committing := self._taken.get_nowait()) is not None:
                committing.cancel()
                left.append(committing)
        await asyncio.gather(*left, return_exceptions=True)
