"""Systems with a restartable PostgreSQL, and the checks after each fault."""

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from cli.dev.signing_key import ensure_development_key
from tests.support.ledger import Counts
from tests.support.platform import Platform, serve_settings
from tests.support.processes import Processes, environment_of
from tests.support.receiver import Receiver
from tests.support.restartable_postgres import RestartablePostgres
from tests.support.system_under_load import ENGINE_MB_MAX, MERCHANTS, Conclude, SystemUnderLoad

_database_numbers = itertools.count(1)


@pytest.fixture
async def database_url(restartable_postgres: RestartablePostgres) -> str:
    """A database of this test's own, on the server that it may take away."""
    assert restartable_postgres.server is not None
    name = f"fault_{next(_database_numbers)}"
    connection = await asyncpg.connect(restartable_postgres.server.url("template1"))
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE postgres")
    await connection.close()
    return restartable_postgres.server.url(name)


@pytest.fixture
def start_system(
    database_url: str, receiver: Receiver, ca_file: Path, tmp_path: Path, pool: Any
) -> Callable[..., AbstractAsyncContextManager[SystemUnderLoad]]:
    """Starts a system with other settings."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[SystemUnderLoad]:
        key = ensure_development_key(tmp_path / "keys")
        processes = Processes(environment_of(database_url, ca_file, key.public_key_file))
        try:
            _, address = await processes.server(**settings)
            async with grpc.aio.insecure_channel(address) as channel:
                platform = Platform(
                    address, key, serve_settings(database_url, ca_file, key), channel
                )
                system = SystemUnderLoad(processes, platform, receiver, pool)
                receiver.default = system.load.answer
                for merchant_id in MERCHANTS:
                    await system.register(merchant_id)
                yield system
        finally:
            await processes.kill_all()

    return start


@pytest.fixture
async def system(
    start_system: Callable[..., AbstractAsyncContextManager[SystemUnderLoad]],
) -> AsyncIterator[SystemUnderLoad]:
    async with start_system() as system:
        yield system


@pytest.fixture
def conclude(record_property: Callable[[str, object], None]) -> Conclude:
    """Return the check at the end of a fault. `most_duplicates` were in flight at its start.

    On a busy machine leases and attempts may time out without a fault, so reclaimed and failed
    deliveries may be duplicates too.
    """

    async def conclude(system: SystemUnderLoad, fault: str, most_duplicates: int) -> Counts:
        await system.is_alive()
        await system.drained()
        await system.verified()
        counts = system.counts()
        retried = await system.failed_attempts()
        bound = max(most_duplicates, system.reclaimed()) + retried
        megabytes = system.megabytes()
        record_property(
            "ledger",
            f"{fault}: {counts}; in flight {most_duplicates}, reclaimed {system.reclaimed()}, "
            f"retried {retried}; "
            f"repeated calls {system.load.repeated}, longest {system.load.longest_wait:.1f} s; "
            f"engine {megabytes:.0f} MB",
        )
        assert counts.lost == counts.unexpected == counts.invalid == 0, str(counts)
        assert counts.duplicate <= bound, str(counts)
        assert megabytes <= ENGINE_MB_MAX
        return counts

    return conclude
