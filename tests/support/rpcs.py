"""All RPCs of the contract, read from the generated descriptors, and functions to call them."""

import importlib
import pkgutil
from collections.abc import Awaitable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import postrider.v1
from tests.support.platform import Metadata, Platform

#: The scope that a token needs, by service.
SCOPES = {
    "WebhookConfigService": "webhooks:manage",
    "DeliveryService": "webhooks:manage",
    "EventService": "events:publish",
    "AdminService": "webhooks:admin",
}
#: These services need a token of a merchant.
MERCHANT_SERVICES = ("WebhookConfigService", "DeliveryService")


def services() -> list[ServiceDescriptor]:
    """Every service of the proto files, including those that the server does not register."""
    return [service for module in _modules() for service in module.services_by_name.values()]


def messages() -> list[Descriptor]:
    """Every message type."""
    return [message for module in _modules() for message in module.message_types_by_name.values()]


def methods() -> list[MethodDescriptor]:
    """All RPCs."""
    return [method for service in services() for method in service.methods]


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


def scope_of(method: MethodDescriptor) -> str:
    return SCOPES[method.containing_service.name]


def token_for(platform: Platform, method: MethodDescriptor) -> str:
    """A token with the scope and, if needed, the merchant for an RPC."""
    merchant_id = "m_1" if method.containing_service.name in MERCHANT_SERVICES else None
    return platform.token(scope_of(method), merchant_id=merchant_id)


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """The status code that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def call(
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    request: Message | None = None,
    metadata: Metadata | None = None,
) -> Any:
    """Send one request and read the last response, or the first of a server stream."""
    request_class = GetMessageClass(method.input_type)
    sent = request_class() if request is None else request
    kind = f"{_arity(method.client_streaming)}_{_arity(method.server_streaming)}"
    stub = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=request_class.SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    running = stub(iter([sent]) if method.client_streaming else sent, metadata=metadata, timeout=20)
    if not method.server_streaming:
        return await running
    if not method.client_streaming:
        # Some streams end only when the caller cancels them, so one response is enough.
        async for answer in running:
            running.cancel()
            return answer
        return None
    answers = [answer async for answer in running]
    return answers[-1] if answers else None


async def pages(rpc: Any, **request: Any) -> list[Any]:
    """The responses of a paginated RPC, from the first page to the last."""
    responses = [await rpc(**request)]
    while token := responses[-1].next_page_token:
        responses.append(await rpc(**request, page_token=token))
    return responses


async def reflected(channel: Any, **options: Any) -> set[str]:
    """The services that server reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = [each async for each in stub.ServerReflectionInfo(iter([request]), **options)]
    return {service.name for service in answer.list_services_response.service}


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(postrider.v1.__path__):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(f"postrider.v1.{module.name}").DESCRIPTOR
