"""The token that each RPC requires. The RPCs come from the descriptors, so none is left out."""

from collections.abc import Callable
from typing import Any

import pytest
from grpc import StatusCode

from server.app import SERVICE_NAMES
from tests.support.platform import Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import (
    MERCHANT_SERVICES,
    SCOPES,
    call,
    code_of,
    methods,
    name_of,
    reflected,
    scope_of,
    services,
    token_for,
)

#: Event types are the same for all merchants.
WITHOUT_MERCHANT = {"WebhookConfigService.ListEventTypes"}


def test_each_service_is_served_and_has_a_scope() -> None:
    assert {service.name for service in services()} == set(SCOPES)
    assert {service.full_name for service in services()} == set(SERVICE_NAMES)


async def test_call_without_valid_token_is_refused(platform: Platform) -> None:
    for method in methods():
        foreign = platform.token(scope_of(method), merchant_id="m_1", issuer="https://else.test")
        for metadata in (None, bearer(foreign)):
            async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID") as error:
                await call(platform.channel, method, metadata=metadata)
            assert "authorization" in error.message, name_of(method)


async def test_missing_scope_is_refused_and_named(platform: Platform) -> None:
    for method in methods():
        scope = scope_of(method)
        others = sorted(set(SCOPES.values()) - {scope})
        for scopes in ((), others, [scope.upper()], [f"{scope}:all"]):
            token = platform.token(*scopes, merchant_id="m_1")
            async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING") as error:
                await call(platform.channel, method, metadata=bearer(token))
            assert error.metadata == {"scope": scope}, name_of(method)
            assert scope in error.message


async def test_scope_of_the_service_is_enough(platform: Platform) -> None:
    expected = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND}
    for method in methods():
        calling = call(platform.channel, method, metadata=bearer(token_for(platform, method)))
        assert await code_of(calling) in expected, name_of(method)


async def test_missing_merchant_is_refused(platform: Platform) -> None:
    token = platform.token("webhooks:manage")
    for method in methods():
        if method.containing_service.name not in MERCHANT_SERVICES:
            continue
        if name_of(method) not in WITHOUT_MERCHANT:
            async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISSING") as error:
                await call(platform.channel, method, metadata=bearer(token))
            assert "merchant_id" in error.message


async def test_scope_is_checked_before_the_database_is_read(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: Any, **__: Any) -> Any:
        raise AssertionError("the database was read")

    for name in ("fetch", "fetchrow"):
        monkeypatch.setattr(f"asyncpg.Pool.{name}", reads)
    for name in ("execute", "scalar", "scalars"):
        monkeypatch.setattr(f"sqlalchemy.ext.asyncio.AsyncSession.{name}", reads)
    for method in methods():
        async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
            await call(platform.channel, method, metadata=bearer(platform.token("other")))


async def test_reflection_is_served_only_when_enabled(
    platform: Platform, start_platform: Callable[..., Any]
) -> None:
    async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
        await reflected(platform.channel)
    authorized = reflected(platform.channel, metadata=platform.operator())
    assert await code_of(authorized) is StatusCode.UNIMPLEMENTED

    async with start_platform(reflection=True) as reflecting:
        assert set(SERVICE_NAMES) < await reflected(reflecting.channel)
