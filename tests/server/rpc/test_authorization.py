"""Which token opens which RPC. Read from the descriptors, so that no RPC can be forgotten."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.app import SERVICE_NAMES
from tests.support.platform import Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import call, methods, name_of, services

SCOPES = {
    "WebhookConfigService": "webhooks:manage",
    "DeliveryService": "webhooks:manage",
    "EventService": "events:publish",
    "AdminService": "webhooks:admin",
}
MERCHANTS_OWN = ("WebhookConfigService", "DeliveryService")
#: The catalogue is the same for everybody.
OF_NO_MERCHANT = {"WebhookConfigService.ListEventTypes"}


def scope_of(method: MethodDescriptor) -> str:
    return SCOPES[method.containing_service.name]


async def code_of(platform: Platform, method: MethodDescriptor, token: str) -> StatusCode:
    try:
        await call(platform.channel, method, metadata=bearer(token))
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


def test_every_service_of_the_contract_is_served_and_has_its_scope_here() -> None:
    assert {service.name for service in services()} == set(SCOPES)
    assert {service.full_name for service in services()} == set(SERVICE_NAMES)


async def test_no_rpc_answers_without_a_token(platform: Platform) -> None:
    for method in methods():
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID") as error:
            await call(platform.channel, method)
        assert "authorization" in error.message, name_of(method)


async def test_no_rpc_answers_a_token_of_another_issuer(platform: Platform) -> None:
    for method in methods():
        token = platform.token(scope_of(method), merchant_id="m_1", issuer="https://else.test")
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await call(platform.channel, method, metadata=bearer(token))


async def test_every_rpc_refuses_a_token_without_its_scope_and_names_it(
    platform: Platform,
) -> None:
    for method in methods():
        scope = scope_of(method)
        others = sorted(set(SCOPES.values()) - {scope})
        for scopes in ((), others, [scope.upper()], [f"{scope}:all"]):
            token = platform.token(*scopes, merchant_id="m_1")
            async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING") as error:
                await call(platform.channel, method, metadata=bearer(token))
            assert error.metadata == {"scope": scope}, name_of(method)
            assert scope in error.message


async def test_every_rpc_gets_past_authorization_with_its_scope_alone(platform: Platform) -> None:
    expected = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND}
    for method in methods():
        merchant_id = "m_1" if method.containing_service.name in MERCHANTS_OWN else None
        token = platform.token(scope_of(method), merchant_id=merchant_id)
        assert await code_of(platform, method, token) in expected, name_of(method)


async def test_a_merchants_rpc_refuses_a_token_without_a_merchant(platform: Platform) -> None:
    token = platform.token("webhooks:manage")
    for method in methods():
        if (
            method.containing_service.name in MERCHANTS_OWN
            and name_of(method) not in OF_NO_MERCHANT
        ):
            async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISSING") as error:
                await call(platform.channel, method, metadata=bearer(token))
            assert "merchant_id" in error.message


async def test_scope_and_merchant_are_asked_for_before_any_data_is_read(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: Any, **__: Any) -> Any:
        raise AssertionError("the database was asked")

    monkeypatch.setattr("asyncpg.Pool.fetch", reads)
    monkeypatch.setattr("asyncpg.Pool.fetchrow", reads)
    monkeypatch.setattr("sqlalchemy.ext.asyncio.AsyncSession.execute", reads)
    monkeypatch.setattr("sqlalchemy.ext.asyncio.AsyncSession.scalar", reads)
    monkeypatch.setattr("sqlalchemy.ext.asyncio.AsyncSession.scalars", reads)
    for method in methods():
        async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
            await call(platform.channel, method, metadata=bearer(platform.token("other")))


async def test_health_needs_no_token(platform: Platform) -> None:
    health: Any = health_pb2_grpc.HealthStub(platform.channel)
    for service in ("", *SERVICE_NAMES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_is_there_only_when_enabled(
    platform: Platform, start_platform: Callable[..., Any]
) -> None:
    async def listed(channel: Any, **options: Any) -> set[str]:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = stub.ServerReflectionInfo(iter([request]), **options)
        async for answer in answers:
            return {service.name for service in answer.list_services_response.service}
        return set()

    async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
        await listed(platform.channel)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await listed(platform.channel, metadata=platform.operator())
    assert unknown.value.code() is StatusCode.UNIMPLEMENTED

    async with start_platform(reflection=True) as reflecting:
        assert set(SERVICE_NAMES) < await listed(reflecting.channel)
