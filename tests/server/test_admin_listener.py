"""The operator's listener: what it serves without a token, and to whom."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from core.errors import ConfigurationError
from server.admin_listener import AdminListener, is_loopback
from server.app import SERVICE_NAMES
from server.settings import ServerSettings
from tests.support.rpcs import call, methods

FREE_PORT = "127.0.0.1:0"


def admin_port(logged: list[Any]) -> int:
    [port] = [entry["port"] for entry in logged if entry["event"] == "admin_listening"]
    return int(port)


def channelz_of(channel: Any) -> Any:
    return channelz_pb2_grpc.ChannelzStub(channel)


async def described(channel: Any) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        return {service.name for service in answer.list_services_response.service}
    return set()


async def servers_seen(channel: grpc.aio.Channel) -> list[Any]:
    """All pages: those of earlier tests in this process are among them, and come first."""
    seen: list[Any] = []
    while True:
        start = seen[-1].ref.server_id + 1 if seen else 0
        page = await channelz_of(channel).GetServers(
            channelz_pb2.GetServersRequest(start_server_id=start)
        )
        seen += page.server
        if page.end:
            return seen


async def test_it_answers_health_reflection_and_channelz_without_a_token(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with (
        start_platform(admin_address=FREE_PORT) as platform,
        grpc.aio.insecure_channel(f"127.0.0.1:{admin_port(logged)}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", *SERVICE_NAMES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert {"grpc.channelz.v1.Channelz", *SERVICE_NAMES} <= await described(channel)

        await platform.publish()
        # The main listener is seen from here, with the call it has served.
        assert 1 in [server.data.calls_succeeded for server in await servers_seen(channel)]
        assert "admin_listener_exposed" not in [entry["event"] for entry in logged]


async def test_it_serves_nothing_of_the_contract(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with (
        start_platform(admin_address=FREE_PORT) as platform,
        grpc.aio.insecure_channel(f"127.0.0.1:{admin_port(logged)}") as channel,
    ):
        for method in methods():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(channel, method, metadata=platform.operator())
            assert refused.value.code() is StatusCode.UNIMPLEMENTED, method.full_name


async def test_the_main_listener_shows_neither_channelz_nor_reflection(
    start_platform: Callable[..., Any],
) -> None:
    async with start_platform(admin_address=FREE_PORT) as platform:
        stub = channelz_of(platform.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetServers(channelz_pb2.GetServersRequest())
        assert refused.value.code() is StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await described(platform.channel)
        assert refused.value.code() is StatusCode.UNAUTHENTICATED


async def test_an_address_beyond_loopback_is_warned_of(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with start_platform(admin_address="0.0.0.0:0"):
        [warning] = [entry for entry in logged if entry["event"] == "admin_listener_exposed"]
    assert warning["log_level"] == "warning"
    assert warning["setting"] == "WEBHOOK_ADMIN_ADDRESS"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:50052", True),
        ("127.9.9.9:1", True),
        ("[::1]:50052", True),
        ("localhost:50052", True),
        ("unix:/run/postrider/admin.sock", True),
        ("0.0.0.0:50052", False),
        ("[::]:50052", False),
        ("10.0.0.4:50052", False),
        ("admin.example.org:50052", False),
    ],
)
def test_only_addresses_of_this_machine_alone_are_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


async def test_an_address_that_was_set_and_is_taken_stops_the_start(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with start_platform(admin_address=FREE_PORT):
        taken = f"127.0.0.1:{admin_port(logged)}"
        with pytest.raises(ConfigurationError, match="WEBHOOK_ADMIN_ADDRESS") as refused:
            async with start_platform(admin_address=taken):
                pass
        assert taken in refused.value.message


async def test_a_second_server_finds_the_default_taken_and_does_without(
    logged: list[Any],
) -> None:
    first = listener(ServerSettings(admin_address=FREE_PORT))
    await first.start()
    by_default = ServerSettings.model_construct(
        _fields_set=set(), admin_address=f"127.0.0.1:{first.port}"
    )
    second = listener(by_default)
    await second.start()
    assert second.port == 0
    assert "admin_listener_off" in [entry["event"] for entry in logged]
    for either in (first, second):
        await either.stop()


def listener(settings: ServerSettings) -> AdminListener:
    return AdminListener(settings, health_aio.HealthServicer(), SERVICE_NAMES)


@pytest.mark.parametrize("text", ["off", "OFF"])
def test_it_can_be_turned_off(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_ADMIN_ADDRESS", text)
    assert ServerSettings().admin_address is None
