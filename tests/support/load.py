"""Load that continues during a fault: clients that retry and a receiver that counts."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
from aiohttp import web

from postrider.v1 import event_pb2, event_service_pb2
from tests.support.platform import Platform
from tests.support.processes import AMPLE

#: After these codes the client does not know the result and retries.
_UNKNOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
_CALL_SECONDS = 5.0
_REPEAT_SECONDS = 0.1


class Load:
    """Publishes to the merchants in turn. Each batch is repeated until it is acknowledged, and at
    most `window` events have not arrived."""

    def __init__(
        self, platform: Platform, merchants: Sequence[str], batch: int = 10, window: int = 200
    ) -> None:
        self.acknowledged: list[str] = []
        self.repeated = 0
        #: Seconds between the first call of a batch and its acknowledgement.
        self.longest_wait = 0.0
        self._platform = platform
        self._merchants = merchants
        self._batch = batch
        self.window = window
        #: The shortest and longest response time of the receiver, in seconds.
        self.seconds = (0.005, 0.04)
        self._arrived: set[str] = set()
        self._batches = 0
        self._stopped = False
        self._changed = asyncio.Condition()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer 200 after a short delay."""
        await asyncio.sleep(random.uniform(*self.seconds))  # noqa: S311 - a receiver's own time
        async with self._changed:
            self._arrived.add(request.headers["webhook-id"])
            self._changed.notify_all()
        return web.Response()

    @asynccontextmanager
    async def running(self, clients: int = 3) -> AsyncIterator["Load"]:
        """Publish until the context ends. Then wait until all acknowledged events have arrived."""
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._publish())
            try:
                yield self
            finally:
                self._stopped = True
                async with self._changed:
                    self._changed.notify_all()
        await self.all_arrived()

    @asynccontextmanager
    async def pressing_on(self) -> AsyncIterator[None]:
        """Clients stop waiting for arrivals, for faults in which nothing arrives."""
        window, self.window = self.window, sys.maxsize
        async with self._changed:
            self._changed.notify_all()
        try:
            yield
        finally:
            self.window = window

    @property
    def arrived(self) -> int:
        """The number of different events that have arrived."""
        return len(self._arrived)

    async def arrived_more(self, count: int, timeout: float = AMPLE) -> None:
        """Return when this many more different events have arrived."""
        wanted = len(self._arrived) + count
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: len(self._arrived) >= wanted)

    async def repeated_more(self, count: int, timeout: float = AMPLE) -> None:
        """Return when this many more calls have failed and were sent again."""
        wanted = self.repeated + count
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self.repeated >= wanted)

    async def fresh_arrives(self, timeout: float = AMPLE) -> float:
        """Publish an event until it is acknowledged. Returns the seconds until it arrives."""
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(timeout):
            await self._publish_one_batch(1)
            await self.has_arrived(self.acknowledged[-1])
        return asyncio.get_running_loop().time() - began

    async def has_arrived(self, event_id: str, timeout: float = AMPLE) -> None:
        """Return when this event has arrived."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: event_id in self._arrived)

    async def all_arrived(self, timeout: float = AMPLE) -> None:
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(lambda: self._arrived.issuperset(self.acknowledged))

    async def _publish(self) -> None:
        while not self._stopped:
            await self._publish_one_batch(self._batch)
            async with self._changed:
                await self._changed.wait_for(
                    lambda: (
                        self._stopped or len(self.acknowledged) - len(self._arrived) < self.window
                    )
                )

    async def _publish_one_batch(self, size: int) -> None:
        self._batches += 1
        request = event_service_pb2.PublishEventsRequest(
            events=[self._event(self._batches, number) for number in range(size)]
        )
        began = asyncio.get_running_loop().time()
        while not await self._is_acknowledged(request):
            async with self._changed:
                self.repeated += 1
                self._changed.notify_all()
            await asyncio.sleep(_REPEAT_SECONDS)
        self.longest_wait = max(self.longest_wait, asyncio.get_running_loop().time() - began)

    async def _is_acknowledged(self, request: event_service_pb2.PublishEventsRequest) -> bool:
        try:
            response = await self._platform.events.PublishEvents(
                request, metadata=self._platform.producer(), timeout=_CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code() not in _UNKNOWN:
                raise
            return False
        self.acknowledged += [result.event.id for result in response.results]
        return True

    def _event(self, batch: int, number: int) -> event_pb2.EventInput:
        return event_pb2.EventInput(
            merchant_id=self._merchants[(batch + number) % len(self._merchants)],
            type="payment.succeeded",
            payload_text=f'{{"batch": {batch}, "number": {number}}}',
            idempotency_key=f"key-{batch}-{number}",
        )
