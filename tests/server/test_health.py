"""grpc.health.v1 while the server starts, loses its database and drains."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.app import LIVENESS, SERVICE_NAMES
from tests.support.platform import Platform
from tests.support.restartable_postgres import RestartablePostgres

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
pb: Any = health_pb2
#: The interval is 0.05 s and the connect timeout 0.5 s. The rest is for a busy machine.
MAX_SECONDS = 5


def watch(channel: grpc.aio.Channel, service: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service))


async def next_status(watched: Any) -> int:
    async with asyncio.timeout(MAX_SECONDS):
        return int((await watched.read()).status)


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    found = {
        name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
        for name in ("", *SERVICE_NAMES, LIVENESS)
    }
    listed = (await stub.List(pb.HealthListRequest())).statuses
    assert {name: health.status for name, health in listed.items()} == found
    return found


async def test_every_service_serves_as_soon_as_the_server_listens(platform: Platform) -> None:
    assert set((await statuses(platform.channel)).values()) == {SERVING}


async def test_services_stop_serving_while_the_database_is_stopped(
    restartable_postgres: RestartablePostgres, on_own: Platform
) -> None:
    watched = watch(on_own.channel, "postrider.v1.EventService")
    assert await next_status(watched) == SERVING
    restartable_postgres.stop()
    try:
        assert await next_status(watched) == NOT_SERVING
        now = await statuses(on_own.channel)
        # Liveness stays, because a restart would not help.
        assert now.pop(LIVENESS) == SERVING
        assert set(now.values()) == {NOT_SERVING}
    finally:
        restartable_postgres.start()
    assert await next_status(watched) == SERVING
    assert (await on_own.publish()).event.id


async def test_services_stop_serving_while_the_database_is_frozen(
    restartable_postgres: RestartablePostgres, on_own: Platform
) -> None:
    watched = watch(on_own.channel)
    assert await next_status(watched) == SERVING
    with restartable_postgres.frozen():
        assert await next_status(watched) == NOT_SERVING
    assert await next_status(watched) == SERVING


@pytest.mark.server(health_interval_seconds=0.01)
async def test_terminated_session_is_not_an_outage(
    platform: Platform, pool: Any, logged: list[Any]
) -> None:
    watched = watch(platform.channel)
    assert await next_status(watched) == SERVING
    first = await _health_session(pool, None)
    await pool.execute("SELECT pg_terminate_backend($1, 5000)", first)
    # The next session shows that the server has noticed the lost one.
    await _health_session(pool, first)
    silences = [entry for entry in logged if entry["event"].startswith("database_")]
    assert [entry["event"] for entry in silences] == ["database_silent"], silences


async def _health_session(pool: Any, other_than: int | None) -> int:
    async with asyncio.timeout(MAX_SECONDS):
        while True:
            pid: int | None = await pool.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'postrider-health' AND pid IS DISTINCT FROM $1 "
                "AND query LIKE '%pg_is_in_recovery%'",
                other_than,
            )
            if pid is not None:
                return pid


async def test_services_stop_serving_before_the_server_drains(platform: Platform) -> None:
    """The server waits for the watches, because they are calls in flight."""
    async with grpc.aio.insecure_channel(platform.address) as channel:
        watches = [watch(channel, name) for name in ("", *SERVICE_NAMES)]
        assert [await next_status(each) for each in watches] == [SERVING] * len(watches)
        platform.stop.set()
        assert [await next_status(each) for each in watches] == [NOT_SERVING] * len(watches)
        assert not watches[0].done()
