"""Sends batches over one StreamEvents call: several in flight, acknowledged in order.

A batch is kept until it is acknowledged. When the stream breaks, unacknowledged batches are sent
again on the next stream, in the same order with the same numbers. If the server refuses a stream,
the error does not name the batch. Each batch is then sent with PublishEvents to get its own error.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import monotonic

import grpc

from postrider.v1 import event_service_pb2, event_service_pb2_grpc
from postrider_client.calls import CallPolicy, is_transient
from postrider_client.errors import PostriderClientError
from postrider_client.transport import Batch, Results, UnaryTransport

#: The limit of the API. The server reads no further.
_UNACKNOWLEDGED_MAX = 16
_WRITE_FAILED = "Internal error from Core"


@dataclass(slots=True)
class _Unacknowledged:
    batch: Batch
    results: asyncio.Future[Results]


class _StreamRefusedError(Exception):
    """The server refused the stream, so the batch must be sent with PublishEvents."""


class StreamTransport:
    """Keeps a stream open while there are batches. Reconnects with backoff."""

    def __init__(
        self,
        stub: "event_service_pb2_grpc.EventServiceAsyncStub",
        unary: UnaryTransport,
        policy: CallPolicy,
    ):
        self._stub = stub
        self._unary = unary
        self._policy = policy
        self._window = asyncio.Semaphore(_UNACKNOWLEDGED_MAX)
        self._unacknowledged: dict[int, _Unacknowledged] = {}
        self._last_sequence = 0
        self._acknowledged_count = 0
        #: Set when the current stream has something to write. Replaced with each stream.
        self._work = asyncio.Event()
        #: Whether the current stream has acknowledged a batch.
        self._stream_accepted = False
        self._unsupported = False
        self._closed = False
        self._last_error: Exception | None = None
        self._runner: asyncio.Task[None] | None = None
        self._call: (
            grpc.aio.StreamStreamCall[
                event_service_pb2.StreamEventsRequest, event_service_pb2.StreamEventsResponse
            ]
            | None
        ) = None

    async def send(self, batch: Batch, seconds: float) -> Results:
        deadline = monotonic() + seconds
        if not self._unsupported:
            try:
                return await self._send_on_stream(batch, deadline)
            except _StreamRefusedError:
                pass
        return await self._unary.send(batch, max(deadline - monotonic(), 0.0))

    async def close(self) -> None:
        # The flag is needed, because gRPC can swallow a cancellation that meets a refusal.
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    async def _send_on_stream(self, batch: Batch, deadline: float) -> Results:
        acknowledged_before = self._acknowledged_count
        async with self._window:
            self._last_sequence += 1
            sequence = self._last_sequence
            entry = _Unacknowledged(batch, asyncio.get_running_loop().create_future())
            self._unacknowledged[sequence] = entry
            self._work.set()
            if self._runner is None or self._runner.done():
                self._runner = asyncio.create_task(self._run())
            try:
                async with asyncio.timeout(deadline - monotonic()):
                    return await entry.results
            except TimeoutError:
                # Ends a silent stream, because the next batches would time out on it as well.
                if self._call is not None and self._acknowledged_count == acknowledged_before:
                    self._call.cancel()
                raise self._last_error or TimeoutError("no acknowledgement in time") from None
            finally:
                self._unacknowledged.pop(sequence, None)

    async def _run(self) -> None:
        attempt = 0
        try:
            while not (self._unsupported or self._closed):
                await self._work.wait()
                acknowledged_before = self._acknowledged_count
                error = await self._run_stream()
                if self._acknowledged_count > acknowledged_before:
                    attempt = 0
                if error is not None and not _is_transient(error, accepted=self._stream_accepted):
                    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
                    # An older server without StreamEvents.
                    self._unsupported = code is grpc.StatusCode.UNIMPLEMENTED
                    self._send_without_stream()
                    continue
                if not self._unacknowledged:
                    continue
                await asyncio.sleep(_wait_seconds(self._policy, attempt, error))
                attempt += 1
        finally:
            # Also after an unexpected error, so that no sender waits without end.
            self._send_without_stream()

    async def _run_stream(self) -> Exception | None:
        """Run one stream until it ends. Returns its error, or None if it ended normally."""
        work = self._work = asyncio.Event()
        self._stream_accepted = False
        call = self._stub.StreamEvents(self._requests(work))
        self._call = call
        try:
            async for acknowledgement in call:
                self._acknowledge(acknowledgement)
        except (grpc.aio.AioRpcError, PostriderClientError) as error:
            self._last_error = error
            return error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # Only the call was cancelled, because it was silent.
        else:
            return None
        finally:
            self._call = None
            call.cancel()
            self._work = asyncio.Event()
            if self._unacknowledged:
                self._work.set()
            work.set()  # Ends `_requests` of this stream.

    async def _requests(
        self, work: asyncio.Event
    ) -> AsyncIterator[event_service_pb2.StreamEventsRequest]:
        """Yield the unacknowledged batches in order, then new ones.

        The second batch waits for the first acknowledgement. If a write meets the refusal of the
        stream, gRPC reports only the failed write and not the refusal.
        """
        written = 0
        while self._work is work:
            for sequence, entry in list(self._unacknowledged.items()):
                if written and not self._stream_accepted:
                    break
                if self._work is not work:
                    return
                if sequence > written and sequence in self._unacknowledged:
                    written = sequence
                    yield event_service_pb2.StreamEventsRequest(
                        sequence=sequence, events=entry.batch
                    )
            newest = next(reversed(self._unacknowledged), 0)
            if newest > written and (self._stream_accepted or not written):
                continue
            work.clear()
            if self._work is work:
                await work.wait()

    def _acknowledge(self, response: event_service_pb2.StreamEventsResponse) -> None:
        if not self._stream_accepted:
            self._stream_accepted = True
            self._work.set()
        oldest = next(iter(self._unacknowledged), None)
        if oldest is None or response.sequence < oldest:
            return  # The sender of this batch timed out.
        entry = self._unacknowledged.get(response.sequence)
        in_order = response.sequence == oldest
        if entry is None or not in_order or len(response.results) != len(entry.batch):
            raise PostriderClientError(
                f"the server acknowledged batch {response.sequence} out of order or in part"
            )
        del self._unacknowledged[response.sequence]
        self._acknowledged_count += 1
        if not entry.results.done():
            entry.results.set_result(response.results)

    def _send_without_stream(self) -> None:
        for entry in self._unacknowledged.values():
            if not entry.results.done():
                entry.results.set_exception(_StreamRefusedError())
        self._unacknowledged.clear()
        self._work.clear()


def _is_transient(error: Exception, *, accepted: bool) -> bool:
    """Return whether another stream may succeed. A stopping server may send CANCELLED."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        # A write met the end of the stream. Before the first acknowledgement it can hide a refusal.
        return accepted
    return is_transient(error) or error.code() is grpc.StatusCode.CANCELLED


def _wait_seconds(policy: CallPolicy, attempt: int, error: Exception | None) -> float:
    if isinstance(error, grpc.aio.AioRpcError):
        return policy.wait_seconds(attempt, error)
    return min(policy.backoff_seconds * 2.0**attempt, policy.backoff_max_seconds)
