"""A producer with a given number of concurrent calls, for a time.

Run as a process: `python -m benchmarks.publisher KIND PORT TOKEN SECONDS CONCURRENCY`; KIND is
unary, batch or stream. Prints JSON. Its requests are created before the measurement.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import uvloop

from benchmarks.payload import PAYLOAD
from postrider.v1 import event_service_pb2 as pb
from postrider.v1 import event_service_pb2_grpc
from postrider.v1.event_pb2 import EventInput

BATCH = 100
MERCHANTS = 50
_WARM_UP_SECONDS = 1.0

_EVENTS = [
    EventInput(merchant_id=f"m_{n}", type="payment.succeeded", payload=PAYLOAD)
    for n in range(MERCHANTS)
]


class _Publisher:
    def __init__(self, channel: grpc.aio.Channel, token: str):
        self._stub: Any = event_service_pb2_grpc.EventServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),)
        self.accepted = 0
        self.stopping = False

    async def unary(self) -> None:
        requests = itertools.cycle([pb.PublishEventRequest(event=event) for event in _EVENTS])
        while not self.stopping:
            await self._stub.PublishEvent(next(requests), metadata=self._metadata)
            self.accepted += 1

    async def batch(self) -> None:
        request = pb.PublishEventsRequest(events=_EVENTS * (BATCH // MERCHANTS))
        while not self.stopping:
            response = await self._stub.PublishEvents(request, metadata=self._metadata)
            self._count(response.results)

    async def stream(self) -> None:
        async for response in self._stub.StreamEvents(self._batches(), metadata=self._metadata):
            self._count(response.results)

    async def _batches(self) -> AsyncIterator[pb.StreamEventsRequest]:
        request = pb.StreamEventsRequest(events=_EVENTS * (BATCH // MERCHANTS))
        while not self.stopping:
            request.sequence += 1
            yield request

    def _count(self, results: Any) -> None:
        assert all(result.status == pb.PUBLISH_STATUS_ACCEPTED for result in results)
        self.accepted += len(results)


async def _publish(kind: str, port: int, token: str, seconds: float, concurrency: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        publisher = _Publisher(channel, token)
        run: Callable[[], Any] = getattr(publisher, kind)
        running = [asyncio.create_task(run()) for _ in range(concurrency)]
        await asyncio.sleep(_WARM_UP_SECONDS)
        print("warm", flush=True)
        accepted, began, cpu = publisher.accepted, time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        accepted = publisher.accepted - accepted
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
        print(json.dumps({"accepted": accepted, "seconds": elapsed, "cpu": cpu}), flush=True)
        publisher.stopping = True
        await asyncio.gather(*running)


if __name__ == "__main__":
    uvloop.run(
        _publish(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
    )
