"""Metrics of real processes agree with their deliveries and with docs/operate/metrics.md."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from delivery import database_stats
from tests.e2e.test_processes import open_deliveries, publish, receive, register, stop
from tests.support.metrics_page import ROWS
from tests.support.platform import Platform
from tests.support.processes import AMPLE, Process, Processes, environment_of, talking_to
from tests.support.receiver import Receiver
from tests.support.restartable_postgres import RestartablePostgres
from tests.support.scrape import Scrape, scrape, status_of

ANYWHERE = "127.0.0.1:0"
#: Days are the natural unit of partitions.
ACCEPTED_WARNING = 'postrider_partition_days_ahead use base unit "seconds" instead of "days"'
#: The parser names a counter without `_total`.
FAMILIES = {name.removesuffix("_total"): row for name, row in ROWS.items()}


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


def assert_documented(scraped: Scrape, *, merged: bool = False) -> set[str]:
    """Compare types and labels with the page, and return the names of our metrics."""
    added = {"engine"} if merged else set()
    names = {name for name in scraped.families if name.startswith("postrider_")}
    for name in names:
        row, metric = FAMILIES[name], scraped.families[name]
        assert metric.type == row.kind
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == row.labels | added, name
    return names


def assert_promtool_accepts(scraped: Scrape) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=scraped.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(checked.stderr.splitlines()) <= {ACCEPTED_WARNING}, checked.stdout


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
    server_scrape, engines_scrape = await asyncio.gather(
        scrape(await port_of(server)), scrape(await port_of(engines))
    )

    assert server_scrape.sum("postrider_events_total", result="accepted") == 40
    assert server_scrape.sum("postrider_database_up") == 1
    assert engines_scrape.sum("postrider_engine_up") == 2
    assert engines_scrape.sum("postrider_attempts_total", outcome="succeeded") == 40
    assert engines_scrape.sum("postrider_attempts_total", outcome="http_error") == 3
    assert engines_scrape.sum("postrider_deliveries_total", state="delivered") == 40
    assert engines_scrape.sum("postrider_delivery_attempts_sum") == 43
    assert engines_scrape.sum("postrider_attempt_duration_seconds_count", phase="whole") == 43
    assert engines_scrape.sum("postrider_publish_to_first_attempt_seconds_count") == 40
    assert engines_scrape.sum("postrider_publish_to_delivered_seconds_count") == 40
    for engine in ("1", "2"):
        # Every engine reports the shared database and its own process.
        configs = engines_scrape.values("postrider_webhook_configs", engine=engine, status="active")
        assert configs == [2]
        assert engines_scrape.sum("process_cpu_seconds_total", engine=engine) > 0
        assert engines_scrape.sum("postrider_in_flight_limit", engine=engine) == 500

    names = assert_documented(server_scrape) | assert_documented(engines_scrape, merged=True)
    assert names == set(FAMILIES)
    await until_ready(await port_of(engines), await port_of(server))
    assert await status_of(await port_of(engines), "/live") == 200
    for scraped in (server_scrape, engines_scrape):
        assert_promtool_accepts(scraped)


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
    during = await scrape(port)
    assert during.values("postrider_engine_up", engine="1") == [0]
    assert during.values("postrider_in_flight", engine="1") == []
    assert await status_of(port, "/ready") == 503
    assert await status_of(port, "/live") == 200
    after = await until_all_are_up(port)
    assert after.sum("postrider_attempts_total", engine="1") == 0
    assert after.sum("postrider_attempts_total", engine="2") == before.sum(
        "postrider_attempts_total", engine="2"
    )

    os.kill(second, signal.SIGSTOP)
    frozen = await scrape(port)
    assert frozen.values("postrider_engine_up", engine="1") == [1]
    assert frozen.values("postrider_engine_up", engine="2") == [0]
    os.kill(second, signal.SIGCONT)
    # Its late response is not mistaken for the next one.
    await until_all_are_up(port)
    await stop(engines)


async def until_all_are_up(port: int) -> Scrape:
    async with asyncio.timeout(AMPLE):
        while (scraped := await scrape(port)).sum("postrider_engine_up") != 2:
            pass
    return scraped


@pytest.mark.slow
async def test_scrape_without_database_reports_it_down(
    ca_file: Path, restartable_postgres: RestartablePostgres, platform: Platform
) -> None:
    assert restartable_postgres.server is not None
    url = restartable_postgres.server.url()
    processes = Processes(environment_of(url, ca_file, platform.key.public_key_file))
    try:
        server, _ = await processes.server(server_metrics_address=ANYWHERE)
        engine = await processes.engine(delivery_metrics_address=ANYWHERE)
        server_port, engine_port = await port_of(server), await port_of(engine)
        await until_ready(server_port, engine_port)

        restartable_postgres.stop()
        await server.wait_for("database_away")
        scraped = await until_the_database_is(engine_port, up=0)
        assert scraped.values("postrider_queue_deliveries") == []
        assert scraped.values("postrider_queue_oldest_due_age_seconds") == []
        assert scraped.sum("postrider_attempts_total") == 0
        assert (await scrape(server_port)).sum("postrider_database_up") == 0
        assert await status_of(server_port, "/ready") == 503
        async with asyncio.timeout(AMPLE):
            while await status_of(engine_port, "/ready") == 200:
                pass
        assert await status_of(engine_port, "/live") == 200

        restartable_postgres.start()
        await server.wait_for("database_back")
        scraped = await until_the_database_is(engine_port, up=1)
        assert scraped.sum("postrider_queue_deliveries") == 0
        await until_ready(server_port, engine_port)

        with restartable_postgres.frozen():
            async with asyncio.timeout(
                database_stats.FRESH_SECONDS + 2 * database_stats.WAIT_SECONDS
            ):
                await until_the_database_is(engine_port, up=0)
    finally:
        await processes.kill_all()


async def until_the_database_is(port: int, up: int) -> Scrape:
    async with asyncio.timeout(AMPLE):
        while (scraped := await scrape(port)).sum("postrider_database_up") != up:
            pass
    return scraped


async def until_ready(*ports: int) -> None:
    async with asyncio.timeout(AMPLE):
        while [await status_of(port, "/ready") for port in ports] != [200] * len(ports):
            pass
