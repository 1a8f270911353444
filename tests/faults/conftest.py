"""Scenes on a PostgreSQL of their own, and what every fault ends with."""

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from cli.dev.signing_key import ensure_development_key
from tests.support.fault_scene import ENGINE_MB_MAX, MERCHANTS, Conclude, Scene
from tests.support.ledger import Counts
from tests.support.own_postgres import OwnPostgres
from tests.support.platform import Platform, serve_settings
from tests.support.processes import Processes, environment_of
from tests.support.receiver import Receiver

_database_numbers = itertools.count(1)


@pytest.fixture
async def database_url(own_postgres: OwnPostgres) -> str:
    """A database of this test's own, on the server that it may take away."""
    assert own_postgres.server is not None
    name = f"fault_{next(_database_numbers)}"
    connection = await asyncpg.connect(own_postgres.server.url("template1"))
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
    await connection.close()
    return own_postgres.server.url(name)


@pytest.fixture
def start_scene(
    database_url: str, receiver: Receiver, ca_file: Path, tmp_path: Path, pool: Any
) -> Callable[..., AbstractAsyncContextManager[Scene]]:
    """Starts a scene whose processes have these settings."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Scene]:
        key = ensure_development_key(tmp_path / "keys")
        processes = Processes(environment_of(database_url, ca_file, key.public_key_file))
        try:
            _, address = await processes.server(**settings)
            async with grpc.aio.insecure_channel(address) as channel:
                platform = Platform(
                    address, key, serve_settings(database_url, ca_file, key), channel
                )
                scene = Scene(processes, platform, receiver, pool)
                receiver.default = scene.load.answer
                for merchant_id in MERCHANTS:
                    await scene.register(merchant_id)
                yield scene
        finally:
            await processes.kill_all()

    return start


@pytest.fixture
async def scene(
    start_scene: Callable[..., AbstractAsyncContextManager[Scene]],
) -> AsyncIterator[Scene]:
    async with start_scene() as scene:
        yield scene


@pytest.fixture
def conclude(record_property: Callable[[str, object], None]) -> Conclude:
    """What every fault ends with; `most_duplicates` is what was in flight when it came.

    On a busy machine a lease may end, and an attempt run out of time, without any fault: what was
    reclaimed, and what failed, may have been sent twice as well.
    """

    async def conclude(scene: Scene, fault: str, most_duplicates: int) -> Counts:
        await scene.is_alive()
        await scene.drained()
        await scene.verified()
        counts = scene.counts()
        retried = await scene.failed_attempts()
        bound = max(most_duplicates, scene.reclaimed()) + retried
        megabytes = scene.megabytes()
        record_property(
            "ledger",
            f"{fault}: {counts}; in flight {most_duplicates}, reclaimed {scene.reclaimed()}, "
            f"retried {retried}; "
            f"repeated calls {scene.load.repeated}, longest {scene.load.longest_wait:.1f} s; "
            f"engine {megabytes:.0f} MB",
        )
        assert counts.lost == counts.unexpected == counts.invalid == 0, str(counts)
        assert counts.duplicate <= bound, str(counts)
        assert megabytes <= ENGINE_MB_MAX
        return counts

    return conclude
