"""grpc.health.v1: what a probe hears while the server starts, loses its database, and drains."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.app import LIVENESS, SERVICE_NAMES
from tests.support.own_postgres import OwnPostgres
from tests.support.platform import Platform, running_platform

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
pb: Any = health_pb2
#: Interval 0.05 s, connect timeout 0.5 s, and what a busy machine adds.
SECONDS_UNTIL_TOLD = 5


class Watched:
    """An open Watch of one service."""

    def __init__(self, channel: grpc.aio.Channel, service: str):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(service=service))

    async def next(self) -> int:
        async with asyncio.timeout(SECONDS_UNTIL_TOLD):
            status: int = (await self._call.read()).status
            return status


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    found = {
        name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
        for name in ("", *SERVICE_NAMES, LIVENESS)
    }
    listed = (await stub.List(pb.HealthListRequest())).statuses
    assert {name: health.status for name, health in listed.items()} == found
    return found


@pytest.fixture
async def on_own(
    own_postgres: OwnPostgres, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    assert own_postgres.server is not None
    monkeypatch.setenv("WEBHOOK_DATABASE_CONNECT_TIMEOUT_SECONDS", "0.5")
    async with running_platform(
        own_postgres.server.url(), ca_file, tmp_path, health_interval_seconds=0.05
    ) as platform:
        yield platform


async def test_every_service_serves_as_soon_as_the_server_listens(platform: Platform) -> None:
    assert set((await statuses(platform.channel)).values()) == {SERVING}


async def test_every_service_stops_serving_while_the_database_is_stopped_and_resumes(
    own_postgres: OwnPostgres, on_own: Platform
) -> None:
    watched = Watched(on_own.channel, "postrider.v1.EventService")
    assert await watched.next() == SERVING
    own_postgres.stop()
    try:
        assert await watched.next() == NOT_SERVING
        now = await statuses(on_own.channel)
        # A restart would not mend it.
        assert now.pop(LIVENESS) == SERVING
        assert set(now.values()) == {NOT_SERVING}
    finally:
        own_postgres.start()
    assert await watched.next() == SERVING
    assert (await on_own.publish()).event.id


async def test_a_frozen_database_is_told_in_time_and_forgiven(
    own_postgres: OwnPostgres, on_own: Platform
) -> None:
    watched = Watched(on_own.channel, "")
    assert await watched.next() == SERVING
    with own_postgres.frozen():
        assert await watched.next() == NOT_SERVING
    assert await watched.next() == SERVING


async def test_a_session_that_was_cut_is_no_outage(
    start_platform: Callable[..., Any], pool: Any, logged: list[Any]
) -> None:
    async with start_platform(health_interval_seconds=0.01) as platform:
        watched = Watched(platform.channel, "")
        assert await watched.next() == SERVING
        first = await _health_session(pool, None)
        await pool.execute("SELECT pg_terminate_backend($1, 5000)", first)
        # Once it asks through another session, it has seen the cut.
        await _health_session(pool, first)
        silences = [entry for entry in logged if entry["event"].startswith("database_")]
        assert [entry["event"] for entry in silences] == ["database_silent"], silences


async def _health_session(pool: Any, other_than: int | None) -> int:
    async with asyncio.timeout(SECONDS_UNTIL_TOLD):
        while True:
            pid: int | None = await pool.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'postrider-health' AND pid IS DISTINCT FROM $1 "
                "AND query LIKE '%pg_is_in_recovery%'",
                other_than,
            )
            if pid is not None:
                return pid


async def test_probes_are_told_before_the_server_drains(
    start_platform: Callable[..., Any],
) -> None:
    async with AsyncExitStack() as server:
        platform = await server.enter_async_context(start_platform())
        async with grpc.aio.insecure_channel(platform.address) as channel:
            watches = [Watched(channel, name) for name in ("", *SERVICE_NAMES)]
            assert [await watch.next() for watch in watches] == [SERVING] * len(watches)
            stopping = asyncio.create_task(server.aclose())
            # The watches are calls in flight: they are told while the server waits for them.
            assert [await watch.next() for watch in watches] == [NOT_SERVING] * len(watches)
            assert not stopping.done()
        await stopping
