"""Every RPC of the contract, read from the generated descriptors, and a way to call any of them."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import postrider.v1
from tests.support.platform import Metadata


def services() -> list[ServiceDescriptor]:
    """Every service that a proto file of ours defines, whether or not somebody serves it."""
    return [service for module in _modules() for service in module.services_by_name.values()]


def messages() -> list[Descriptor]:
    """Every message type."""
    return [message for module in _modules() for message in module.message_types_by_name.values()]


def methods() -> list[MethodDescriptor]:
    """Every RPC."""
    return [method for service in services() for method in service.methods]


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


async def call(
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    request: Message | None = None,
    metadata: Metadata | None = None,
) -> Any:
    """Send one request and read the last answer; of a stream to one request, the first."""
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
        # Some streams end only when the caller hangs up; that they answer is what matters here.
        async for answer in running:
            running.cancel()
            return answer
        return None
    answers = [answer async for answer in running]
    return answers[-1] if answers else None


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _modules() -> Iterator[Any]:
    for module in pkgutil.iter_modules(postrider.v1.__path__):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(f"postrider.v1.{module.name}").DESCRIPTOR
