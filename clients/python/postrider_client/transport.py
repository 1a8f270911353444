"""The port through which a publisher sends batches. Every event has an idempotency key."""

from collections.abc import Sequence
from typing import Protocol

from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc

type Batch = Sequence[event_pb2.EventInput]
type Results = Sequence[event_service_pb2.PublishResult]


class Transport(Protocol):
    """Sends batches concurrently. It may send a batch twice, because its events have keys."""

    async def send(self, batch: Batch, seconds: float) -> Results:
        """Return the results in the order of the events. Raises the last error after `seconds`."""
        ...

    async def close(self) -> None:
        """Stop sending. Batches in flight fail."""
        ...


class UnaryTransport:
    """Sends each batch with PublishEvents. The client's interceptor repeats the call."""

    def __init__(self, stub: "event_service_pb2_grpc.EventServiceAsyncStub"):
        self._stub = stub

    async def send(self, batch: Batch, seconds: float) -> Results:
        request = event_service_pb2.PublishEventsRequest(events=batch)
        response = await self._stub.PublishEvents(request, timeout=seconds)
        return response.results

    async def close(self) -> None:
        pass
