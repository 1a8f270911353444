"""The bare handler: an empty grpc.aio handler with the same request and response types.

Run as a process: `python -m benchmarks.empty_server PORT`.
"""

import asyncio
import signal
import sys
from typing import Any

import grpc
import uvloop

from postrider.v1 import event_service_pb2 as pb


async def _publish_event(_request: pb.PublishEventRequest, _context: Any) -> Any:
    return pb.PublishEventResponse()


async def _serve(port: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        _publish_event,
        request_deserializer=pb.PublishEventRequest.FromString,
        response_serializer=pb.PublishEventResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "postrider.v1.EventService", {"PublishEvent": handler}
            )
        ]
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await stop.wait()
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
