"""The generated stubs also work for synchronous callers.

The channel of grpcio-testing stands in for the server. Its server is not used, because it calls
async servicers without awaiting them.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc_testing

from postrider.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc

SERVICE = event_service_pb2.DESCRIPTOR.services_by_name["EventService"]


def publish(
    channel: grpc.Channel, request: event_service_pb2.PublishEventRequest, token: tuple[str, str]
) -> event_service_pb2.PublishEventResponse:
    """A type-checked synchronous call."""
    stub = event_service_pb2_grpc.EventServiceStub(channel)
    return stub.PublishEvent(request, metadata=(token,), timeout=20)


def test_sync_stub_sends_the_request_and_returns_the_response() -> None:
    channel: Any = grpc_testing.channel([SERVICE], grpc_testing.strict_real_time())
    event = event_pb2.EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"{}")
    request = event_service_pb2.PublishEventRequest(event=event)
    response = event_service_pb2.PublishEventResponse(event=event_pb2.Event(id="evt_1"))
    token = ("authorization", "Bearer x")

    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(publish, channel, request, token)
        metadata, sent, rpc = channel.take_unary_unary(SERVICE.methods_by_name["PublishEvent"])
        rpc.send_initial_metadata(())
        rpc.terminate(response, (), grpc.StatusCode.OK, "")

    assert sent == request
    assert token in metadata
    assert call.result() == response
