"""How a batch gets to the server. Every event has a key, so a transport may send one twice."""

from collections.abc import Sequence
from typing import Protocol

from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc

type Batch = Sequence[event_pb2.EventInput]
type Results = Sequence[event_service_pb2.PublishResult]


class Transport(Protocol):
    """Sends batches, several at a time."""

    async def send(self, batch: Batch, seconds: float) -> Results:
        """The results in the order of the events, or the last error after so many seconds."""
        ...

    async def close(self) -> None:
        """Let go; batches that are still under way fail."""
        ...


class UnaryTransport:
    """A PublishEvents call for each batch; the client's interceptor repeats it."""

    def __init__(self, stub: "event_service_pb2_grpc.EventServiceAsyncStub"):
        self._stub = stub

    async def send(self, batch: Batch, seconds: float) -> Results:
        request = event_service_pb2.PublishEventsRequest(events=batch)
        response = await self._stub.PublishEvents(request, timeout=seconds)
        return response.results

    async def close(self) -> None:
        pass
