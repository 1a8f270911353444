"""Publisher: many events a second, in batches, without losing one between the caller and the store.

publish() waits when too much is pending, so memory is bounded. Every event has an idempotency key
before it is first sent. Batches may overtake each other; those with ordering keys never do. Each
event ends as a result or an error in its future, and flush() and close() raise what failed even if
nobody looked at the futures.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from postrider.v1 import event_pb2, event_service_pb2
from postrider_client.calls import keyed
from postrider_client.errors import EventRejected, PublisherClosed, PublishFailed
from postrider_client.home_loop import HomeLoop
from postrider_client.transport import Results, Transport

#: The server takes 1,000 events and 16 MiB a message; one event may have 1 MiB.
_BATCH_MAX = 1000
_BATCH_BYTES = 4 * 1024 * 1024
#: Of many failures the first are told, and the number of all.
_FAILURES_KEPT = 100


@dataclass(frozen=True, slots=True)
class Published:
    """An event that is durable; a duplicate was so before, under the same key."""

    event: event_pb2.Event
    duplicate: bool

    @property
    def id(self) -> str:
        return self.event.id


@dataclass(slots=True, eq=False)
class _Pending:
    number: int
    event: event_pb2.EventInput
    future: asyncio.Future[Published]
    size: int
    since: float


class Publisher:
    """Made by PostriderClient.publisher(); `async with` closes it."""

    def __init__(
        self,
        transport: Transport,
        *,
        linger_ms: float = 5.0,
        max_batch: int = 500,
        max_in_flight: int = 8,
        max_pending: int = 10_000,
        delivery_seconds: float = 60.0,
    ):
        if not 1 <= max_batch <= _BATCH_MAX:
            raise ValueError(f"max_batch must be 1 to {_BATCH_MAX}")
        if max_in_flight < 1 or max_pending < 1 or linger_ms < 0:
            raise ValueError("max_in_flight and max_pending must be 1 or more, linger_ms 0 or more")
        self._home = HomeLoop()
        self._transport = transport
        self._linger = linger_ms / 1000
        self._delivery_seconds = delivery_seconds
        self._max_batch = max_batch
        self._slots = asyncio.Semaphore(max_in_flight)
        self._budget = asyncio.Semaphore(max_pending)
        # Fair: who waits first is let in first.
        self._turn = asyncio.Lock()
        self._waiting: deque[_Pending] = deque()
        self._waiting_bytes = 0
        self._unsettled: set[_Pending] = set()
        self._numbered = self._hurried = 0
        self._arrived, self._ripe, self._progress = (asyncio.Event() for _ in range(3))
        self._failures: list[Exception] = []
        self._failure_count = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._runner: asyncio.Task[None] | None = None
        self._closed = False

    async def publish(self, event: event_pb2.EventInput) -> asyncio.Future[Published]:
        """Take the event, once there is room; the future is done when it is durable or refused."""
        self._home.require()
        # A copy, since the caller may reuse the message while it waits here. First of all, since
        # what is no event raises, and must not take a place with it.
        taken = event_pb2.EventInput()
        taken.CopyFrom(event)
        taken = keyed(taken)
        loop = asyncio.get_running_loop()
        await self._budget.acquire()
        if self._closed:
            self._budget.release()
            raise PublisherClosed("this publisher is closed")
        self._numbered += 1
        pending = _Pending(
            self._numbered, taken, loop.create_future(), taken.ByteSize(), loop.time()
        )
        self._waiting.append(pending)
        self._waiting_bytes += pending.size
        self._unsettled.add(pending)
        self._arrived.set()
        self._judge_ripeness()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return pending.future

    async def flush(self) -> None:
        """Send what is pending now and wait for it; raises an ExceptionGroup of what failed."""
        self._home.require()
        self._hurried = self._numbered
        self._judge_ripeness()
        awaited = set(self._unsettled)
        while awaited := awaited & self._unsettled:
            self._progress.clear()
            await self._progress.wait()
        self._raise_failures()

    async def close(self) -> None:
        """Take nothing more, deliver what is pending, and raise as flush() does."""
        self._home.require()
        self._closed = True
        try:
            await self.flush()
        finally:
            await self._stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self) -> None:
        while True:
            # The place first: while there is none, the batch grows.
            await self._slots.acquire()
            batch = await self._next_batch()
            task = asyncio.create_task(self._send(batch))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _next_batch(self) -> list[_Pending]:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0].since + self._linger):
                await self._ripe.wait()
        batch: list[_Pending] = []
        size = 0
        while self._waiting and len(batch) < self._max_batch:
            size += self._waiting[0].size
            if batch and size > _BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        self._waiting_bytes -= sum(pending.size for pending in batch)
        self._judge_ripeness()
        return batch

    def _judge_ripeness(self) -> None:
        """A batch is ripe when it is full, or when somebody waits for what is in it."""
        full = len(self._waiting) >= self._max_batch or self._waiting_bytes >= _BATCH_BYTES
        if full or (self._waiting and self._waiting[0].number <= self._hurried):
            self._ripe.set()
        else:
            self._ripe.clear()

    async def _send(self, batch: Sequence[_Pending]) -> None:
        try:
            events = [pending.event for pending in batch]
            in_order = any(event.ordering_key for event in events)
            async with self._turn if in_order else nullcontext():
                results = await self._transport.send(events, self._seconds_left(batch))
            self._resolve(batch, results)
        except asyncio.CancelledError as error:
            self._fail_all(batch, error)
            raise
        except Exception as error:
            self._fail_all(batch, error)
        finally:
            self._unsettled.difference_update(batch)
            for _ in batch:
                self._budget.release()
            self._slots.release()
            self._progress.set()

    def _seconds_left(self, batch: Sequence[_Pending]) -> float:
        """For how long a batch may still be tried: as long as its last event may wait.

        What it waited here counts. Else, with the server away, each round of batches would wait
        anew, and close() for all of the rounds.
        """
        now = asyncio.get_running_loop().time()
        left = batch[-1].since + self._delivery_seconds - now
        if left <= 0:
            raise TimeoutError(f"its turn did not come within {self._delivery_seconds:g} s")
        return left

    def _resolve(self, batch: Sequence[_Pending], results: Results) -> None:
        if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results for {len(batch)} events")
        for pending, result in zip(batch, results, strict=True):
            if result.status == event_service_pb2.PUBLISH_STATUS_REJECTED:
                self._fail(pending, EventRejected(result.reason, result.message))
            elif not pending.future.done():
                duplicate = result.status == event_service_pb2.PUBLISH_STATUS_DUPLICATE
                pending.future.set_result(Published(result.event, duplicate))

    def _fail_all(self, batch: Sequence[_Pending], cause: BaseException) -> None:
        if isinstance(cause, grpc.aio.AioRpcError):
            said = f"{cause.code().name}: {cause.details()}"
        else:
            said = str(cause) or type(cause).__name__
        for pending in batch:
            failure = PublishFailed(
                f"an event may not have been accepted ({said}); publish it again under its key",
                pending.event.idempotency_key,
            )
            failure.__cause__ = cause
            self._fail(pending, failure)

    def _fail(self, pending: _Pending, error: Exception) -> None:
        self._failure_count += 1
        if len(self._failures) < _FAILURES_KEPT:
            self._failures.append(error)
        if not pending.future.done():
            pending.future.set_exception(error)
            # Seen, as far as asyncio is concerned: flush() and close() raise it in any case.
            pending.future.exception()

    def _raise_failures(self) -> None:
        failures, count = self._failures, self._failure_count
        self._failures, self._failure_count = [], 0
        if failures:
            raise ExceptionGroup(f"{count} events were not published", failures)

    async def _stop(self) -> None:
        """Whatever is still pending, because close() itself was cancelled, fails and says so."""
        tasks = {*self._sending, *([self._runner] if self._runner else ())}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Those of a batch whose task had not begun when it was cancelled are among them.
        left = sorted(self._unsettled, key=lambda pending: pending.number)
        self._waiting.clear()
        self._fail_all(left, PublisherClosed("this publisher was closed before it was sent"))
        self._unsettled.difference_update(left)
        for _ in left:
            self._budget.release()
        self._progress.set()
        await self._transport.close()
