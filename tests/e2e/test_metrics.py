"""What Prometheus reads of real processes: it agrees with what happened, and with the catalogue."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cli.metrics import families
from cli.metrics.families import Family
from delivery import database_stats
from tests.e2e.test_processes import open_deliveries, publish, receive, register, stop
from tests.support.own_postgres import OwnPostgres
from tests.support.platform import Platform
from tests.support.processes import AMPLE, Process, Processes, environment_of, talking_to
from tests.support.receiver import Receiver
from tests.support.scrape import Scrape, scrape, status_of

ANYWHERE = "127.0.0.1:0"
#: A person thinks of partitions in days.
MEANT = 'postrider_partition_days_ahead use base unit "seconds" instead of "days"'
FAMILIES = {
    family.name.removesuffix("_total"): family
    for family in vars(families).values()
    if isinstance(family, Family)
}


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path
) -> AsyncIterator[Processes]:
    processes = Processes(environment_of(database_url, ca_file, platform.key.public_key_file))
    yield processes
    await processes.kill_all()


async def port_of(process: Process) -> int:
    [entry] = await process.wait_for("metrics_listening")
    port: int = entry["port"]
    return port


async def settled(pool: Any) -> None:
    async with asyncio.timeout(AMPLE):
        while await open_deliveries(pool):
            pass


def assert_agrees_with_the_catalogue(said: Scrape, *, of_several: bool = False) -> set[str]:
    """The names of ours that were said, each with the type, help and labels it is to have."""
    more = {"engine"} if of_several else set()
    ours = {name for name in said.families if name.startswith("postrider_")}
    for name in ours:
        family, metric = FAMILIES[name], said.families[name]
        assert (metric.type, metric.documentation) == (family.kind, family.meaning)
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(family.labels) | more, name
    return ours


def assert_promtool_likes(said: Scrape) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=said.text, capture_output=True, text=True, check=False
    )
    assert set(checked.stderr.splitlines()) <= {MEANT}, checked.stdout


async def test_metrics_of_server_and_two_engines_add_up(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    await register(platform, receiver, "m_1", "m_2")
    receiver.script.extend([500, 500, 400])
    (server, address), engines = await asyncio.gather(
        processes.server(server_metrics_address=ANYWHERE),
        processes.start(
            "delivery",
            "--processes=2",
            delivery_metrics_address=ANYWHERE,
            retry_schedule_seconds="0.01",
        ),
    )
    await engines.wait_for("delivering", 2)
    async with talking_to(address, platform) as client:
        acknowledged = await publish(client, ["m_1", "m_2"], 40)
        await receive(receiver, acknowledged)
        await settled(pool)
    of_server, of_engines = await asyncio.gather(
        scrape(await port_of(server)), scrape(await port_of(engines))
    )

    assert of_server.sum("postrider_events_total", result="accepted") == 40
    assert of_server.sum("postrider_database_up") == 1
    assert of_engines.sum("postrider_engine_up") == 2
    assert of_engines.sum("postrider_attempts_total", outcome="succeeded") == 40
    assert of_engines.sum("postrider_attempts_total", outcome="http_error") == 3
    assert of_engines.sum("postrider_deliveries_total", state="delivered") == 40
    assert of_engines.sum("postrider_delivery_attempts_sum") == 43
    assert of_engines.sum("postrider_attempt_duration_seconds_count", phase="whole") == 43
    assert of_engines.sum("postrider_publish_to_first_attempt_seconds_count") == 40
    assert of_engines.sum("postrider_publish_to_delivered_seconds_count") == 40
    for engine in ("1", "2"):
        # Each says how the one database stands, and how its own process fares.
        configs = of_engines.values("postrider_webhook_configs", engine=engine, status="active")
        assert configs == [2]
        assert of_engines.sum("process_cpu_seconds_total", engine=engine) > 0
        assert of_engines.sum("postrider_in_flight_limit", engine=engine) == 500

    # Together with what a supervisor adds, every metric there is.
    said = assert_agrees_with_the_catalogue(of_server)
    said |= assert_agrees_with_the_catalogue(of_engines, of_several=True)
    assert said == set(FAMILIES)
    await until_ready(await port_of(engines), await port_of(server))
    assert await status_of(await port_of(engines), "/live") == 200
    for one in (of_server, of_engines):
        assert_promtool_likes(one)


@pytest.mark.slow
async def test_metrics_of_killed_and_frozen_engines(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    await register(platform, receiver, "m_1")
    engines = await processes.start("delivery", "--processes=2", delivery_metrics_address=ANYWHERE)
    await engines.wait_for("delivering", 2)
    port = await port_of(engines)
    await receive(receiver, await publish(platform, ["m_1"], 20))
    await settled(pool)
    before = await scrape(port)
    assert before.sum("postrider_attempts_total") == 20
    [first, second] = [entry["pid"] for entry in engines.named("engine_started")]

    os.kill(first, signal.SIGKILL)
    await engines.wait_for("engine_ended")
    while_away = await scrape(port)
    assert while_away.values("postrider_engine_up", engine="1") == [0]
    assert while_away.values("postrider_in_flight", engine="1") == []
    assert await status_of(port, "/ready") == 503
    assert await status_of(port, "/live") == 200
    after = await once_all_are_up(port)
    assert after.sum("postrider_attempts_total", engine="1") == 0
    assert after.sum("postrider_attempts_total", engine="2") == before.sum(
        "postrider_attempts_total", engine="2"
    )

    os.kill(second, signal.SIGSTOP)
    frozen = await scrape(port)
    assert frozen.values("postrider_engine_up", engine="1") == [1]
    assert frozen.values("postrider_engine_up", engine="2") == [0]
    os.kill(second, signal.SIGCONT)
    # What it says late is not taken for an answer to the next.
    await once_all_are_up(port)
    await stop(engines)


async def once_all_are_up(port: int) -> Scrape:
    async with asyncio.timeout(AMPLE):
        while (said := await scrape(port)).sum("postrider_engine_up") != 2:
            pass
    return said


@pytest.mark.slow
async def test_scrape_without_database_reports_it_down(
    ca_file: Path, own_postgres: OwnPostgres, platform: Platform
) -> None:
    assert own_postgres.server is not None
    url = own_postgres.server.url()
    processes = Processes(environment_of(url, ca_file, platform.key.public_key_file))
    try:
        server, _ = await processes.server(server_metrics_address=ANYWHERE)
        engine = await processes.engine(delivery_metrics_address=ANYWHERE)
        of_server, of_engine = await port_of(server), await port_of(engine)
        await until_ready(of_server, of_engine)

        own_postgres.stop()
        await server.wait_for("database_away")
        said = await once_the_database_is(of_engine, up=0)
        assert said.values("postrider_queue_deliveries") == []
        assert said.values("postrider_queue_oldest_due_age_seconds") == []
        assert said.sum("postrider_attempts_total") == 0
        assert (await scrape(of_server)).sum("postrider_database_up") == 0
        assert await status_of(of_server, "/ready") == 503
        async with asyncio.timeout(AMPLE):
            while await status_of(of_engine, "/ready") == 200:
                pass
        assert await status_of(of_engine, "/live") == 200

        own_postgres.start()
        await server.wait_for("database_back")
        said = await once_the_database_is(of_engine, up=1)
        assert said.sum("postrider_queue_deliveries") == 0
        await until_ready(of_server, of_engine)

        with own_postgres.frozen():
            async with asyncio.timeout(
                database_stats.FRESH_SECONDS + 2 * database_stats.WAIT_SECONDS
            ):
                await once_the_database_is(of_engine, up=0)
    finally:
        await processes.kill_all()


async def once_the_database_is(port: int, up: int) -> Scrape:
    async with asyncio.timeout(AMPLE):
        while (said := await scrape(port)).sum("postrider_database_up") != up:
            pass
    return said


async def until_ready(*ports: int) -> None:
    async with asyncio.timeout(AMPLE):
        while [await status_of(port, "/ready") for port in ports] != [200] * len(ports):
            pass
