"""grpc.health.v1 with all of its methods: the library's servicer leaves List to others."""

from collections.abc import Sequence
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

# Its types do not know the messages of List.
pb: Any = health_pb2


class Health(health_aio.HealthServicer):
    """The health of the services named, of which "" is the server as a whole."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self._names = names

    async def List(self, _request: Any, context: Any) -> Any:  # noqa: N802 - as gRPC names it
        """The health of every service at once."""
        response = pb.HealthListResponse()
        for name in self._names:
            asked = pb.HealthCheckRequest(service=name)
            response.statuses[name].CopyFrom(await self.Check(asked, context))
        return response
