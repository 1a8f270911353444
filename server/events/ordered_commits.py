"""Commits the batches of a stream concurrently and acknowledges them in order.

The number of unacknowledged batches is limited. Above the limit no more are read, so that HTTP/2
flow control slows the sender. When a stream ends, its accepted batches are acknowledged first.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class Turns:
    """Runs turns one at a time, in the order of requests, until one fails."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._failure: BaseException | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Run one turn. Raises the error of an earlier turn, because its batch must come first."""
        async with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                yield
            except BaseException as error:
                self._failure = error
                raise


class OrderedCommits[Batch, Ack]:
    """One stream. `commit` checks a batch when it is called, and stores it when awaited."""

    def __init__(
        self, commit: Callable[[Batch], Coroutine[Any, Any, Ack]], unacknowledged_max: int
    ):
        self._commit = commit
        self._budget = asyncio.Semaphore(unacknowledged_max)
        # None ends the queue.
        self._accepted: asyncio.Queue[asyncio.Task[Ack] | None] = asyncio.Queue()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Read no more. After the last acknowledgement, `error` is raised if it is set."""
        if not self._ended:
            self._ended, self._error = True, error
            self._accepted.put_nowait(None)

    async def acknowledge(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[Ack]:
        """Yield the acknowledgement of each batch, until the last one or the first failure."""
        self._reading = asyncio.create_task(self._read(batches))
        try:
            while (committing := await self._accepted.get()) is not None:
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
                self._accepted.put_nowait(asyncio.create_task(self._commit(batch)))
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
        """Cancel the remaining batches after a failure.

        The read ends with the call, because gRPC does not allow to cancel it earlier.
        """
        self._budget.release()
        cancelled = []
        while not self._accepted.empty():
            if (committing := self._accepted.get_nowait()) is not None:
                committing.cancel()
                cancelled.append(committing)
        await asyncio.gather(*cancelled, return_exceptions=True)
