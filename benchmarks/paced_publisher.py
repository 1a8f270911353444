"""A producer that publishes at a given rate, or as fast as its events are received.

Run as a process: `python -m benchmarks.paced_publisher '{"port": …}'`, see `Orders`. The rate does
not depend on responses, so a slow response delays no other call. Without a rate, a limited number
of events is published and not yet received, by the receiver's ledger. Prints JSON at the end.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop

from benchmarks.ledger import Ledger
from benchmarks.payload import stamped
from postrider.v1 import event_service_pb2 as pb
from postrider.v1 import event_service_pb2_grpc
from postrider.v1.event_pb2 import EventInput

_CALLS_BY_BATCH = 4
_CALLS_BY_ONE = 64
_LOOK_SECONDS = 0.002
# A busy server refuses streams before it reads them; the stamp stays that of the first
# try, so the wait counts. The receipts show duplicates.
_RETRY = {
    "methodConfig": [
        {
            "name": [{"service": "postrider.v1.EventService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@dataclass(frozen=True)
class Orders:
    """The events to publish. It ends after `seconds` or `events`, at the first of both."""

    port: int
    token: str
    ledger: str
    #: Merchants are `PREFIXn`, for n from 0, in turn.
    merchants: str
    merchant_count: int
    #: Events per call. 1 selects PublishEvent.
    batch: int
    #: Events per second. 0 is as fast as `window` allows.
    rate: float = 0
    window: int = 2000
    seconds: float = 3600
    events: int = 10**9
    #: The number of the first event.
    first_sequence: int = 0
    #: The time to start, in seconds since 1970, after the connect. 0 starts at once.
    starts_at: float = 0

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


class _Publisher:
    def __init__(self, orders: Orders, channel: grpc.aio.Channel):
        self._orders = orders
        self._stub: Any = event_service_pb2_grpc.EventServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {orders.token}"),)
        self._sequence = itertools.count(orders.first_sequence)
        self._left = orders.events
        self._until = time.perf_counter() + orders.seconds
        self.accepted = 0
        self.published = 0

    async def at_a_rate(self) -> None:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as calls:
            for number in itertools.count():
                due = began + number * self._orders.batch / self._orders.rate
                if due > self._until or not self._left:
                    break
                await asyncio.sleep(max(due - time.perf_counter(), 0))
                calls.create_task(self._publish())

    async def within_a_window(self) -> None:
        ledger = Ledger(Path(self._orders.ledger))
        already = len(ledger)

        async def publish_on() -> None:
            while self._left and time.perf_counter() < self._until:
                if self.published - (len(ledger) - already) >= self._orders.window:
                    await asyncio.sleep(_LOOK_SECONDS)
                else:
                    await self._publish()

        async with asyncio.TaskGroup() as calls:
            for _ in range(_CALLS_BY_ONE if self._orders.batch == 1 else _CALLS_BY_BATCH):
                calls.create_task(publish_on())

    async def _publish(self) -> None:
        events = list(self._events())
        self.published += len(events)
        if self._orders.batch == 1:
            request = pb.PublishEventRequest(event=events[0])
            await self._stub.PublishEvent(request, metadata=self._metadata)
            self.accepted += 1
            return
        response = await self._stub.PublishEvents(
            pb.PublishEventsRequest(events=events), metadata=self._metadata
        )
        refused = [r for r in response.results if r.status != pb.PUBLISH_STATUS_ACCEPTED]
        if refused:
            raise RuntimeError(f"{len(refused)} events were refused, the first: {refused[0]}")
        self.accepted += len(events)

    def _events(self) -> Iterator[EventInput]:
        count = min(self._orders.batch, self._left)
        self._left -= count
        now = time.time()
        for _ in range(count):
            sequence = next(self._sequence)
            yield EventInput(
                merchant_id=f"{self._orders.merchants}{sequence % self._orders.merchant_count}",
                type="payment.succeeded",
                payload=stamped(now, sequence),
            )


async def _wait_for_the_start(starts_at: float, channel: grpc.aio.Channel) -> None:
    await channel.channel_ready()
    early = starts_at - time.time()
    if early < 0:
        raise RuntimeError(f"the publisher was up {-early:.1f} s after it was to begin")
    await asyncio.sleep(early)


async def _publish(orders: Orders) -> None:
    options = [("grpc.service_config", json.dumps(_RETRY))]
    address = f"127.0.0.1:{orders.port}"
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        if orders.starts_at:
            await _wait_for_the_start(orders.starts_at, channel)
        publisher = _Publisher(orders, channel)
        began, cpu = time.perf_counter(), time.process_time()
        run: Callable[[], Any] = publisher.at_a_rate if orders.rate else publisher.within_a_window
        await run()
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"accepted": publisher.accepted, "seconds": elapsed, "cpu": cpu}))


if __name__ == "__main__":
    uvloop.run(_publish(Orders(**json.loads(sys.argv[1]))))
