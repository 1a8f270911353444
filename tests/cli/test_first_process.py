"""As the first process of a container, which the kernel treats unlike any other."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.platform import Platform
from tests.support.processes import AMPLE, Process, Processes, environment_of

#: Ordinary users need a user namespace around the process namespace.
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]
if os.geteuid() != 0:
    NAMESPACE += ["--user", "--map-current-user"]
# migrations/env.py takes it for as long as it migrates.
MIGRATION_LOCK = 0x706F7374

pytestmark = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this machine gives nobody a process namespace",
)


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path
) -> AsyncIterator[Processes]:
    processes = Processes(environment_of(database_url, ca_file, platform.key.public_key_file))
    yield processes
    await processes.kill_all()


def first_process(namespace: Process) -> int:
    """The pid, seen from here, of the process that is 1 in its namespace."""
    pid = namespace.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


@pytest.mark.slow
async def test_a_supervisor_that_is_pid_1_lets_its_engines_drain(processes: Processes) -> None:
    supervisor = await processes.start("delivery", "--processes=2", under=NAMESPACE)
    await supervisor.wait_for("delivering", 2)
    os.kill(first_process(supervisor), signal.SIGTERM)
    assert await supervisor.exit_code() == 0
    assert len(supervisor.named("stopping")) == 2


async def test_a_migration_that_is_pid_1_ends_when_it_is_told_to(
    processes: Processes, pool: Any
) -> None:
    async with pool.acquire() as other:
        await other.execute(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
        migration = await processes.start("migrate", under=NAMESPACE)
        await waiting_for_the_lock(pool)
        os.kill(first_process(migration), signal.SIGTERM)
        assert await migration.exit_code() == 128 + signal.SIGTERM


async def waiting_for_the_lock(pool: Any) -> None:
    async with asyncio.timeout(AMPLE):
        while not await pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'postrider-migrate' "
            "AND query LIKE '%pg_try_advisory_lock%'"
        ):
            pass
