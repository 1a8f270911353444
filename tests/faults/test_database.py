"""PostgreSQL restarts, freezes, loses connections and waits for locks under load."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.support.load import Load
from tests.support.postgres_proxy import proxied
from tests.support.restartable_postgres import RestartablePostgres
from tests.support.system_under_load import MERCHANTS, PATIENT, Conclude, SystemUnderLoad

type StartSystem = Callable[..., AbstractAsyncContextManager[SystemUnderLoad]]


@pytest.mark.parametrize("how", ["fast", pytest.param("immediate", marks=pytest.mark.slow)])
async def test_postgresql_restart(
    system: SystemUnderLoad, conclude: Conclude, restartable_postgres: RestartablePostgres, how: str
) -> None:
    await system.engine()
    await system.engine()
    in_flight = 0
    async with system.load.running() as load:
        for _ in range(2):
            await load.arrived_more(200)
            in_flight += await system.leased()
            if how == "fast":
                restartable_postgres.stop()
            else:
                restartable_postgres.crash()
            restartable_postgres.start()
            # Nothing is restarted with it, and it goes on soon.
            await load.arrived_more(200, timeout=20)
    await conclude(system, f"{how} restart of PostgreSQL, twice", in_flight)
    assert all(engine.lives for engine in system.engines)


@pytest.mark.slow
async def test_connection_cut_after_commit(
    start_system: StartSystem, conclude: Conclude, database_url: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with (
            proxied(database_url, Path(directory)) as (proxy, url),
            start_system(database_url=url) as system,
        ):
            await system.engine(**PATIENT)
            system.load = Load(system.platform, MERCHANTS, batch=1)
            system.receiver.default = system.load.answer
            proxy.one_in = 5
            async with system.load.running(clients=8) as load:
                await load.arrived_more(1000, timeout=60)
            proxy.one_in = 0
            assert proxy.cuts >= 20
            assert load.repeated >= proxy.cuts
            fault = f"connection cut after {proxy.cuts} of {proxy.commits} commits"
            await conclude(system, fault, 0)
            stored = await system.pool.fetchval("SELECT count(*) FROM events")
            assert stored == len(set(load.acknowledged)) == len(load.acknowledged)


@pytest.mark.slow
async def test_database_frozen_for_30_seconds(
    system: SystemUnderLoad, conclude: Conclude, restartable_postgres: RestartablePostgres
) -> None:
    # Nothing may wait for the end of a lease, which is longer than anybody here has patience.
    await system.engine(**PATIENT)
    await system.engine(**PATIENT)
    async with system.load.running() as load:
        await load.arrived_more(200)
        in_flight = await system.leased()
        with restartable_postgres.frozen():
            await asyncio.sleep(30)
        await load.arrived_more(200, timeout=20)
    await conclude(system, "database frozen for 30 s", in_flight)
    assert all(engine.lives for engine in system.engines)


@pytest.mark.slow
async def test_rows_locked_for_60_seconds(
    system: SystemUnderLoad, conclude: Conclude, pool: Any
) -> None:
    """An idle transaction has locked a webhook config and some deliveries."""
    for _ in range(2):
        # So that a wait for a lock is to a lease what it is in production.
        await system.engine(database_statement_timeout_seconds=1)
    async with system.load.running() as load:
        await load.arrived_more(200)
        async with pool.acquire() as idle, idle.transaction():
            held = await idle.fetch(
                "SELECT id FROM delivery_queue WHERE merchant_id = $1"
                " LIMIT 20 FOR UPDATE SKIP LOCKED",
                MERCHANTS[0],
            )
            await idle.execute(
                "SELECT FROM webhook_configs WHERE merchant_id = $1 FOR UPDATE", MERCHANTS[0]
            )
            arrived = load.arrived
            await asyncio.sleep(60)
            during = load.arrived - arrived
        await load.arrived_more(200)
    fault = f"{len(held)} rows held for 60 s, {during} arrived meanwhile"
    await conclude(system, fault, len(held))
    assert during >= 1000
