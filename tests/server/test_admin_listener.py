"""The operator's listener: health, reflection and channelz on loopback, without a token."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from core.errors import ConfigurationError
from server.admin_listener import AdminListener, is_loopback
from server.app import SERVICE_NAMES
from server.settings import ServerSettings
from tests.support.platform import Platform
from tests.support.rpcs import call, code_of, methods, reflected

FREE_PORT = "127.0.0.1:0"
# The port of the listener is in the log, so `logged` starts before the platform.
pytestmark = [pytest.mark.usefixtures("logged"), pytest.mark.server(admin_address=FREE_PORT)]


def admin_port(logged: list[Any]) -> int:
    [port] = [entry["port"] for entry in logged if entry["event"] == "admin_listening"]
    return int(port)


async def servers(channel: Any) -> list[Any]:
    """The servers of this process in channelz. Servers of earlier tests come first."""
    stub = channelz_pb2_grpc.ChannelzStub(channel)
    found: list[Any] = []
    while True:
        start = found[-1].ref.server_id + 1 if found else 0
        page = await stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=start))
        found += page.server
        if page.end:
            return found


@pytest.fixture
async def admin_channel(platform: Platform, logged: list[Any]) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{admin_port(logged)}") as channel:
        yield channel


async def test_health_reflection_and_channelz_need_no_token(
    platform: Platform, admin_channel: Any, logged: list[Any]
) -> None:
    health: Any = health_pb2_grpc.HealthStub(admin_channel)
    for name in ("", *SERVICE_NAMES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert {"grpc.channelz.v1.Channelz", *SERVICE_NAMES} <= await reflected(admin_channel)

    await platform.publish()
    # The main listener is among the servers, with the call it has served.
    assert 1 in [server.data.calls_succeeded for server in await servers(admin_channel)]
    assert "admin_listener_exposed" not in [entry["event"] for entry in logged]


async def test_rpcs_of_the_contract_are_not_served(platform: Platform, admin_channel: Any) -> None:
    for method in methods():
        calling = call(admin_channel, method, metadata=platform.operator())
        assert await code_of(calling) is StatusCode.UNIMPLEMENTED, method.full_name


async def test_main_listener_has_no_channelz_or_reflection(platform: Platform) -> None:
    for calling in (servers(platform.channel), reflected(platform.channel)):
        assert await code_of(calling) is StatusCode.UNAUTHENTICATED


async def test_address_beyond_loopback_is_logged_as_a_warning(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with start_platform(admin_address="0.0.0.0:0"):
        [warning] = [entry for entry in logged if entry["event"] == "admin_listener_exposed"]
    assert warning["log_level"] == "warning"
    assert warning["setting"] == "WEBHOOK_ADMIN_ADDRESS"


def test_loopback_addresses_are_recognized() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "[::1]", "localhost"):
        assert is_loopback(f"{host}:50052"), host
    assert is_loopback("unix:/run/postrider/admin.sock")
    for host in ("0.0.0.0", "[::]", "10.0.0.4", "admin.example.org"):  # noqa: S104
        assert not is_loopback(f"{host}:50052"), host


async def test_configured_address_in_use_fails_the_start(
    start_platform: Callable[..., Any], logged: list[Any], platform: Platform
) -> None:
    taken = f"127.0.0.1:{admin_port(logged)}"
    with pytest.raises(ConfigurationError, match="WEBHOOK_ADMIN_ADDRESS") as refused:
        async with start_platform(admin_address=taken):
            pass
    assert taken in refused.value.message


async def test_second_server_starts_without_the_default_address(logged: list[Any]) -> None:
    def listener(settings: ServerSettings) -> AdminListener:
        return AdminListener(settings, health_aio.HealthServicer(), SERVICE_NAMES)

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


@pytest.mark.parametrize("text", ["off", "OFF"])
def test_listener_can_be_turned_off(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_ADMIN_ADDRESS", text)
    assert ServerSettings().admin_address is None
