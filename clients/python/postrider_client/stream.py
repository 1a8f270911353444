"""Batches over one StreamEvents call, several on their way, acknowledged in order.

A batch stays here until it is acknowledged; when the stream breaks, what was not is sent again on
the next one, in the same order and under the same numbers. A stream that the server refuses says
nothing of which batch it was about, so each of them then goes by PublishEvents and is told its own.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import monotonic

import grpc

from postrider.v1 import event_service_pb2, event_service_pb2_grpc
from postrider_client.calls import CallPolicy, is_passing
from postrider_client.errors import PostriderClientError
from postrider_client.transport import Batch, Results, UnaryTransport

#: The contract's own bound; the server reads no further.
_UNACKNOWLEDGED_MAX = 16
_BROKEN_WRITE = "Internal error from Core"


@dataclass(slots=True)
class _Sent:
    batch: Batch
    acked: asyncio.Future[Results]


class _StreamRefused(Exception):
    """The batch has to go by itself."""


class StreamTransport:
    """Keeps a stream open while there is something to send; reconnects with backoff."""

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
        self._unacked: dict[int, _Sent] = {}
        self._sequence = 0
        self._acked_count = 0
        self._grown = asyncio.Event()
        self._proven = False
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
        ends_at = monotonic() + seconds
        if not self._unsupported:
            try:
                return await self._stream(batch, ends_at)
            except _StreamRefused:
                pass
        return await self._unary.send(batch, max(ends_at - monotonic(), 0.0))

    async def close(self) -> None:
        # To cancel is not enough: where a refusal comes at that moment, gRPC keeps it to itself.
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    async def _stream(self, batch: Batch, ends_at: float) -> Results:
        acked_count = self._acked_count
        async with self._window:
            self._sequence += 1
            sequence = self._sequence
            sent = _Sent(batch, asyncio.get_running_loop().create_future())
            self._unacked[sequence] = sent
            self._grown.set()
            if self._runner is None or self._runner.done():
                self._runner = asyncio.create_task(self._run())
            try:
                async with asyncio.timeout(ends_at - monotonic()):
                    return await sent.acked
            except TimeoutError:
                # A stream that stays silent for so long would let the next batches wait as well.
                if self._call is not None and self._acked_count == acked_count:
                    self._call.cancel()
                raise self._last_error or TimeoutError("no acknowledgement in time") from None
            finally:
                self._unacked.pop(sequence, None)

    async def _run(self) -> None:
        attempt = 0
        try:
            while not (self._unsupported or self._closed):
                await self._grown.wait()
                before = self._acked_count
                error = await self._stream_once()
                if self._acked_count > before:
                    attempt = 0
                if error is not None and not _is_passing(error, proven=self._proven):
                    self._refuse(error)
                    continue
                if not self._unacked:
                    continue
                await asyncio.sleep(_wait_seconds(self._policy, attempt, error))
                attempt += 1
        finally:
            # Also when this task itself is at fault: nobody else would end their waiting.
            self._send_singly()

    async def _stream_once(self) -> Exception | None:
        """Until the stream ends; the error it ended with, None when it just ended."""
        grown = self._grown = asyncio.Event()
        self._proven = False
        call = self._stub.StreamEvents(self._requests(grown))
        self._call = call
        try:
            async for ack in call:
                self._acknowledge(ack)
        except (grpc.aio.AioRpcError, PostriderClientError) as error:
            self._last_error = error
            return error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # It was the call that was cancelled, after a silence.
        else:
            return None
        finally:
            self._call = None
            call.cancel()
            self._grown = asyncio.Event()
            if self._unacked:
                self._grown.set()
            grown.set()  # Ends the requests of this stream.

    async def _requests(
        self, grown: asyncio.Event
    ) -> AsyncIterator[event_service_pb2.StreamEventsRequest]:
        """What is not acknowledged, from the oldest, and then what is added.

        The second waits until the first is acknowledged: where a write meets a refusal, gRPC
        reports the write, and nobody would learn why the stream was refused.
        """
        written = 0
        while self._grown is grown:
            for sequence, sent in list(self._unacked.items()):
                if written and not self._proven:
                    break
                if self._grown is not grown:
                    return
                if sequence > written and sequence in self._unacked:
                    written = sequence
                    yield event_service_pb2.StreamEventsRequest(
                        sequence=sequence, events=sent.batch
                    )
            may_go_on = self._proven or not written
            if may_go_on and self._unacked and next(reversed(self._unacked)) > written:
                continue
            grown.clear()
            if self._grown is grown:
                await grown.wait()

    def _acknowledge(self, ack: event_service_pb2.StreamEventsResponse) -> None:
        if not self._proven:
            self._proven = True
            self._grown.set()
        oldest = next(iter(self._unacked), None)
        if oldest is None or ack.sequence < oldest:
            return  # Of a batch whose sender has given up.
        sent = self._unacked.get(ack.sequence)
        if ack.sequence != oldest or sent is None or len(ack.results) != len(sent.batch):
            raise PostriderClientError(
                f"the server acknowledged batch {ack.sequence} out of turn or in part"
            )
        del self._unacked[ack.sequence]
        self._acked_count += 1
        if not sent.acked.done():
            sent.acked.set_result(ack.results)

    def _refuse(self, error: Exception) -> None:
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
        # A server from before there were streams.
        self._unsupported = code is grpc.StatusCode.UNIMPLEMENTED
        self._send_singly()

    def _send_singly(self) -> None:
        for sent in self._unacked.values():
            if not sent.acked.done():
                sent.acked.set_exception(_StreamRefused())
        self._unacked.clear()
        self._grown.clear()


def _is_passing(error: Exception, *, proven: bool) -> bool:
    """Whether another stream may succeed. A server that drains may also just cancel."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _BROKEN_WRITE:
        # A write met the end of the stream. At its beginning that may hide a refusal.
        return proven
    return is_passing(error) or error.code() is grpc.StatusCode.CANCELLED


def _wait_seconds(policy: CallPolicy, attempt: int, error: Exception | None) -> float:
    if isinstance(error, grpc.aio.AioRpcError):
        return policy.wait_seconds(attempt, error)
    return min(policy.backoff_seconds * 2.0**attempt, policy.backoff_max_seconds)
