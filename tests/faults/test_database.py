"""PostgreSQL restarts, freezes, loses connections and is held up by somebody, all under load."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_scene import MERCHANTS, PATIENT, Conclude, Scene
from tests.support.load import Load
from tests.support.own_postgres import OwnPostgres
from tests.support.postgres_proxy import proxied

type StartScene = Callable[..., AbstractAsyncContextManager[Scene]]


@pytest.mark.parametrize("how", ["fast", pytest.param("immediate", marks=pytest.mark.slow)])
async def test_postgresql_restart(
    scene: Scene, conclude: Conclude, own_postgres: OwnPostgres, how: str
) -> None:
    await scene.engine()
    await scene.engine()
    in_flight = 0
    async with scene.load.running() as load:
        for _ in range(2):
            await load.arrived_more(200)
            in_flight += await scene.leased()
            if how == "fast":
                own_postgres.stop()
            else:
                own_postgres.crash()
            own_postgres.start()
            # Nothing is restarted with it, and it goes on soon.
            await load.arrived_more(200, timeout=20)
    await conclude(scene, f"{how} restart of PostgreSQL, twice", in_flight)
    assert all(engine.lives for engine in scene.engines)


@pytest.mark.slow
async def test_connection_cut_after_commit(
    start_scene: StartScene, conclude: Conclude, database_url: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with (
            proxied(database_url, Path(directory)) as (proxy, url),
            start_scene(database_url=url) as scene,
        ):
            await scene.engine(**PATIENT)
            scene.load = Load(scene.platform, MERCHANTS, batch=1)
            scene.receiver.default = scene.load.answer
            proxy.one_in = 5
            async with scene.load.running(clients=8) as load:
                await load.arrived_more(1000, timeout=60)
            proxy.one_in = 0
            assert proxy.cuts >= 20
            assert load.repeated >= proxy.cuts
            fault = f"connection cut after {proxy.cuts} of {proxy.commits} commits"
            await conclude(scene, fault, 0)
            stored = await scene.pool.fetchval("SELECT count(*) FROM events")
            assert stored == len(set(load.acknowledged)) == len(load.acknowledged)


@pytest.mark.slow
async def test_database_frozen_for_30_seconds(
    scene: Scene, conclude: Conclude, own_postgres: OwnPostgres
) -> None:
    # Nothing may wait for the end of a lease, which is longer than anybody here has patience.
    await scene.engine(**PATIENT)
    await scene.engine(**PATIENT)
    async with scene.load.running() as load:
        await load.arrived_more(200)
        in_flight = await scene.leased()
        with own_postgres.frozen():
            await asyncio.sleep(30)
        await load.arrived_more(200, timeout=20)
    await conclude(scene, "database frozen for 30 s", in_flight)
    assert all(engine.lives for engine in scene.engines)


@pytest.mark.slow
async def test_rows_locked_for_60_seconds(scene: Scene, conclude: Conclude, pool: Any) -> None:
    """Somebody's transaction has locked a webhook config and some deliveries, and is idle."""
    for _ in range(2):
        # So that a wait for a lock is to a lease what it is in production.
        await scene.engine(database_statement_timeout_seconds=1)
    async with scene.load.running() as load:
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
    await conclude(scene, fault, len(held))
    assert during >= 1000
