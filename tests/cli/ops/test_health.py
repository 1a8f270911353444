"""`postrider health`, as a container's health check runs it: what it says, and its exit code."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from cli.ops.health import NothingListens, Process, ask, ask_all
from core.errors import ConfigurationError, Unavailable
from server.app import LIVENESS
from tests.support.processes import POSTRIDER


@pytest.fixture
def closed_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def engines_saying(status: int, text: str) -> AsyncIterator[str]:
    """A metrics listener whose engines are all live, and of readiness say this; its address."""

    async def answer(request: web.Request) -> web.Response:
        well = request.path == "/live"
        return web.Response(status=200 if well else status, text="" if well else text)

    app = web.Application()
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def run(*arguments: str, **settings: str) -> tuple[int | None, str, str]:
    """The command's exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        POSTRIDER,
        "health",
        *arguments,
        env={"PATH": str(POSTRIDER.parent), **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def said(process: Process, address: str | None, question: str | None) -> str:
    return await asyncio.to_thread(ask, process, address, question, 5.0)


async def all_said(addresses: Mapping[Process, str | None]) -> str:
    return await asyncio.to_thread(ask_all, addresses, 5.0)


async def test_the_server_is_asked_for_all_services_or_for_one(
    start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    async with start_platform(admin_address="127.0.0.1:0") as platform:
        [port] = [entry["port"] for entry in logged if entry["event"] == "admin_listening"]
        admin = f"127.0.0.1:{port}"
        assert await said("server", admin, None) == "server: SERVING"
        assert await said("server", admin, "postrider.v1.EventService") == "server: SERVING"
        # As it is set, for a listener on every interface.
        assert await said("server", f"[::]:{port}", LIVENESS) == "server: SERVING"
        assert await said("server", platform.address, LIVENESS) == "server: SERVING"
        with pytest.raises(ConfigurationError, match=r"no service 'postrider.v2'.*liveness"):
            await said("server", admin, "postrider.v2")


async def test_a_server_that_is_there_and_not_well_is_told_from_none(
    closed_port: int,
) -> None:
    server, health = grpc.aio.server(), health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(Unavailable, match="is NOT_SERVING: its database is unavailable") as raised:
        await said("server", f"127.0.0.1:{port}", None)
    assert not isinstance(raised.value, NothingListens)
    async with engines_saying(200, "") as well:
        with pytest.raises(Unavailable, match="is NOT_SERVING"):
            await all_said({"server": f"127.0.0.1:{port}", "delivery": well})
    await server.stop(0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(Unavailable, match="does not respond"):
            await asyncio.to_thread(ask, "server", f"127.0.0.1:{mute.getsockname()[1]}", None, 0.2)
    with pytest.raises(NothingListens, match=r"no `postrider server`.*WEBHOOK_ADMIN_ADDRESS"):
        await said("server", f"127.0.0.1:{closed_port}", None)
    with pytest.raises(ConfigurationError, match=r"WEBHOOK_ADMIN_ADDRESS is off.*--address"):
        await said("server", None, None)


async def test_engines_are_asked_whether_they_are_ready_or_live(closed_port: int) -> None:
    async with engines_saying(503, "engine 2 reaches no database") as address:
        assert await said("delivery", address, "live") == "delivery: live"
        with pytest.raises(Unavailable, match=r"not ready \(503\): engine 2 reaches no database"):
            await said("delivery", address, None)
        with pytest.raises(ConfigurationError, match="unknown check 'steady'"):
            await said("delivery", address, "steady")
    with pytest.raises(NothingListens, match="WEBHOOK_DELIVERY_METRICS_ADDRESS"):
        await said("delivery", f"127.0.0.1:{closed_port}", None)


async def test_without_a_process_whichever_run_here_must_be_well(closed_port: int) -> None:
    nobody = f"127.0.0.1:{closed_port}"
    async with engines_saying(200, "") as well, engines_saying(503, "no database") as unwell:
        assert await all_said({"server": nobody, "delivery": well}) == "delivery: ready"
        with pytest.raises(Unavailable, match="no database"):
            await all_said({"server": None, "delivery": unwell})
    with pytest.raises(Unavailable, match=r"postrider server(.|\n)*postrider delivery"):
        await all_said({"server": nobody, "delivery": nobody})


async def test_the_exit_code_tells_well_from_not_from_a_wrong_question(closed_port: int) -> None:
    async with engines_saying(200, "") as address:
        answers = await asyncio.gather(
            run(
                WEBHOOK_DELIVERY_METRICS_ADDRESS=address,
                WEBHOOK_ADMIN_ADDRESS=f"127.0.0.1:{closed_port}",
            ),
            run("server", "--address", f"127.0.0.1:{closed_port}"),
            run("delivery", "steady", WEBHOOK_DELIVERY_METRICS_ADDRESS=address),
        )
    assert [code for code, _, _ in answers] == [0, 1, 2]
    assert answers[0][1] == "delivery: ready\n"
    assert answers[1][2].startswith("postrider: no `postrider server` answers at 127.0.0.1:")
    assert answers[2][2].startswith("postrider: unknown check")
