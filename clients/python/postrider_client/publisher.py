"""Publisher: sends many events per second in batches and reports the result of each event.

Memory is bounded because publish() waits while too many events are pending. Each event has an
idempotency key before it is sent, so a repeated batch creates no duplicates. Batches with ordering
keys are sent one at a time, in the order of publish(). Other batches may overtake each other.
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
from postrider_client.calls import with_idempotency_key
from postrider_client.errors import EventRejected, PublisherClosed, PublishFailed
from postrider_client.loop_guard import LoopGuard
from postrider_client.transport import Results, Transport

#: The server accepts 1,000 events and 16 MiB per message, and 1 MiB per event.
_BATCH_EVENTS_MAX = 1000
_BATCH_BYTES_MAX = 4 * 1024 * 1024
#: Errors kept for the next flush(). Further ones are only counted.
_ERRORS_MAX = 100


@dataclass(frozen=True, slots=True)
class Published:
    """A durable event. `duplicate` means that an earlier publish had the same idempotency key."""

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
    published_at: float


class Publisher:
    """Created by PostriderClient.publisher(). `async with` closes it."""

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
        if not 1 <= max_batch <= _BATCH_EVENTS_MAX:
            raise ValueError(f"max_batch must be 1 to {_BATCH_EVENTS_MAX}")
        if max_in_flight < 1 or max_pending < 1 or linger_ms < 0:
            raise ValueError("max_in_flight and max_pending must be 1 or more, linger_ms 0 or more")
        self._loop_guard = LoopGuard()
        self._transport = transport
        self._linger_seconds = linger_ms / 1000
        self._delivery_seconds = delivery_seconds
        self._max_batch = max_batch
        self._batch_slots = asyncio.Semaphore(max_in_flight)
        self._event_slots = asyncio.Semaphore(max_pending)
        # asyncio.Lock is fair, so ordered batches are sent in their order.
        self._ordered_batch = asyncio.Lock()
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        #: Events without a result: queued or in flight.
        self._unsettled: set[_Pending] = set()
        self._last_number = 0
        #: Events up to this number are sent without lingering.
        self._flush_until = 0
        self._queued, self._batch_ready, self._settled = (asyncio.Event() for _ in range(3))
        self._errors: list[Exception] = []
        self._error_count = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._runner: asyncio.Task[None] | None = None
        self._closed = False

    async def publish(self, event: event_pb2.EventInput) -> asyncio.Future[Published]:
        """Queue an event, after waiting while too many are pending.

        The future ends when the event is durable or has failed.
        """
        self._loop_guard.check()
        # A copy, because the caller may reuse the message. Copied before a slot is taken, because
        # CopyFrom raises for an argument of another type.
        copy = event_pb2.EventInput()
        copy.CopyFrom(event)
        copy = with_idempotency_key(copy)
        loop = asyncio.get_running_loop()
        await self._event_slots.acquire()
        if self._closed:
            self._event_slots.release()
            raise PublisherClosed("this publisher is closed")
        self._last_number += 1
        pending = _Pending(
            self._last_number, copy, loop.create_future(), copy.ByteSize(), loop.time()
        )
        self._queue.append(pending)
        self._queued_bytes += pending.size
        self._unsettled.add(pending)
        self._queued.set()
        self._update_batch_ready()
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return pending.future

    async def flush(self) -> None:
        """Send pending events now and wait. Raises an ExceptionGroup of errors since the last."""
        self._loop_guard.check()
        self._flush_until = self._last_number
        self._update_batch_ready()
        awaited = set(self._unsettled)
        while awaited := awaited & self._unsettled:
            self._settled.clear()
            await self._settled.wait()
        self._raise_errors()

    async def close(self) -> None:
        """Accept no more events, send pending ones, and raise as flush() does."""
        self._loop_guard.check()
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
            # The slot first, because a batch grows while all slots are in use.
            await self._batch_slots.acquire()
            batch = await self._next_batch()
            task = asyncio.create_task(self._send(batch))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _next_batch(self) -> list[_Pending]:
        while not self._queue:
            self._queued.clear()
            await self._queued.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._queue[0].published_at + self._linger_seconds):
                await self._batch_ready.wait()
        batch: list[_Pending] = []
        size = 0
        while self._queue and len(batch) < self._max_batch:
            size += self._queue[0].size
            if batch and size > _BATCH_BYTES_MAX:
                break
            batch.append(self._queue.popleft())
        self._queued_bytes -= sum(pending.size for pending in batch)
        self._update_batch_ready()
        return batch

    def _update_batch_ready(self) -> None:
        """A batch is ready if it is full or if flush() waits for one of its events."""
        full = len(self._queue) >= self._max_batch or self._queued_bytes >= _BATCH_BYTES_MAX
        if full or (self._queue and self._queue[0].number <= self._flush_until):
            self._batch_ready.set()
        else:
            self._batch_ready.clear()

    async def _send(self, batch: Sequence[_Pending]) -> None:
        try:
            events = [pending.event for pending in batch]
            ordered = any(event.ordering_key for event in events)
            async with self._ordered_batch if ordered else nullcontext():
                results = await self._transport.send(events, self._remaining_seconds(batch))
            self._resolve(batch, results)
        except asyncio.CancelledError as error:
            self._fail_batch(batch, error)
            raise
        except Exception as error:
            self._fail_batch(batch, error)
        finally:
            self._unsettled.difference_update(batch)
            for _ in batch:
                self._event_slots.release()
            self._batch_slots.release()
            self._settled.set()

    def _remaining_seconds(self, batch: Sequence[_Pending]) -> float:
        """Return the time until the deadline of the batch's last event.

        The wait in the queue counts. Otherwise, while the server is down, close() would wait for
        one full timeout after the other.
        """
        now = asyncio.get_running_loop().time()
        remaining = batch[-1].published_at + self._delivery_seconds - now
        if remaining <= 0:
            raise TimeoutError(f"not sent within {self._delivery_seconds:g} s")
        return remaining

    def _resolve(self, batch: Sequence[_Pending], results: Results) -> None:
        if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results for {len(batch)} events")
        for pending, result in zip(batch, results, strict=True):
            if result.status == event_service_pb2.PUBLISH_STATUS_REJECTED:
                self._fail(pending, EventRejected(result.reason, result.message))
            elif not pending.future.done():
                duplicate = result.status == event_service_pb2.PUBLISH_STATUS_DUPLICATE
                pending.future.set_result(Published(result.event, duplicate))

    def _fail_batch(self, batch: Sequence[_Pending], cause: BaseException) -> None:
        if isinstance(cause, grpc.aio.AioRpcError):
            text = f"{cause.code().name}: {cause.details()}"
        else:
            text = str(cause) or type(cause).__name__
        for pending in batch:
            error = PublishFailed(
                f"an event may not have been accepted ({text}): publish it again with its key",
                pending.event.idempotency_key,
            )
            error.__cause__ = cause
            self._fail(pending, error)

    def _fail(self, pending: _Pending, error: Exception) -> None:
        self._error_count += 1
        if len(self._errors) < _ERRORS_MAX:
            self._errors.append(error)
        if not pending.future.done():
            pending.future.set_exception(error)
            # Marks it as retrieved for asyncio. flush() and close() raise it in any case.
            pending.future.exception()

    def _raise_errors(self) -> None:
        errors, count = self._errors, self._error_count
        self._errors, self._error_count = [], 0
        if errors:
            raise ExceptionGroup(f"{count} events were not published", errors)

    async def _stop(self) -> None:
        """Fail the events that are left because close() was cancelled."""
        tasks = {*self._sending, *([self._runner] if self._runner else ())}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Includes batches whose task was cancelled before it started.
        left = sorted(self._unsettled, key=lambda pending: pending.number)
        self._queue.clear()
        self._fail_batch(left, PublisherClosed("this publisher was closed before it was sent"))
        self._unsettled.difference_update(left)
        for _ in left:
            self._event_slots.release()
        self._settled.set()
        await self._transport.close()
