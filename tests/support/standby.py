"""A PostgreSQL with a synchronous standby, on two ports of loopback, for tests of failover."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg

from cli.dev.postgres import find_binaries
from tests.support.restartable_postgres import RestartablePostgres

_NAMES = ("one", "two")


class Node(RestartablePostgres):
    """One of the two servers. As a standby it connects with its name."""

    def __init__(self, name: str, directory: Path, options: dict[str, str]):
        self.name = name
        self.port = _free_port()
        own = {"listen_addresses": "127.0.0.1", "port": str(self.port), "cluster_name": name}
        super().__init__(directory / name, {**options, **own})

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    async def fetchval(self, query: str) -> Any:
        """Execute a query on a new connection. It must not commit, because commits wait."""
        connection = await asyncpg.connect(self.url(), timeout=10, command_timeout=10)
        try:
            return await connection.fetchval(query)
        finally:
            connection.terminate()

    async def wait_for_standbys(self, names: str) -> None:
        """Let commits wait for these standbys, or for none if empty."""
        await self.fetchval(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        await self.fetchval("SELECT pg_reload_conf()")


class Pair:
    """`primary` and `standby`, which change roles. Commits wait for the standby while it follows.

    As with a failover manager, a promoted server does not wait for a standby until one follows it.
    The old primary keeps waiting, so that it acknowledges nothing if it restarts.
    """

    def __init__(self, directory: Path):
        hba = directory / "pg_hba.conf"
        hba.write_text(
            "local all all trust\nhost all all 127.0.0.1/32 trust\n"
            "host replication all 127.0.0.1/32 trust\n"
        )
        hba.chmod(0o644)
        options = {
            "hba_file": str(hba),
            "max_connections": "200",
            # The kernel keeps written data even if all processes are killed.
            "fsync": "off",
            # Keeps the WAL that a stopped standby needs later.
            "wal_keep_size": "1GB",
            "wal_log_hints": "on",
            "log_min_messages": "fatal",
        }
        self.primary, self.standby = (Node(name, directory, options) for name in _NAMES)

    @property
    def url(self) -> str:
        """The URL of both servers in a fixed order, for the processes."""
        ports = {node.name: node.port for node in (self.primary, self.standby)}
        hosts = ",".join(f"127.0.0.1:{ports[name]}" for name in _NAMES)
        return f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write"

    async def start(self) -> None:
        self.primary.start()
        await self.follow()

    async def follow(self) -> None:
        """Create the standby again from a base backup and wait until commits wait for it."""
        if self.standby.data_dir.exists():
            shutil.rmtree(self.standby.data_dir)
        base_backup(self.primary, self.standby.data_dir, self.standby.name)
        self.standby.start()
        await self.primary.wait_for_standbys("ANY 1 (one, two)")
        query = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'quorum')"
        while not await self.primary.fetchval(f"{query} FROM pg_sleep(0.02)"):
            pass

    async def fail_over(self) -> None:
        """Promote the standby. The old primary becomes the standby and does not follow yet."""
        self.primary, self.standby = self.standby, self.primary
        await self.primary.fetchval("SELECT pg_promote(wait_seconds => 30)")

    def stop(self) -> None:
        for node in (self.primary, self.standby):
            node.stop()


def base_backup(source: Node, into: Path, name: str, *options: str) -> None:
    """A copy of a running server that follows it under this name."""
    program(
        "pg_basebackup",
        f"--dbname=host=127.0.0.1 port={source.port} user=postgres application_name={name}",
        f"--pgdata={into}",
        "--write-recovery-conf",
        "--checkpoint=fast",
        *options,
    )
    # The copied setting would let a promoted standby wait for a standby that does not exist.
    with (into / "postgresql.auto.conf").open("a") as settings:
        settings.write("synchronous_standby_names = ''\n")
    _give_to(into, source.data_dir.stat())


def program(name: str, *arguments: str) -> str:
    """Run a program of PostgreSQL. Returns its output."""
    done = subprocess.run(
        [binary(name), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def operators_path() -> str:
    """The PATH of an operator, with `postrider`, the programs of PostgreSQL and the system."""
    return f"{Path(sys.executable).parent}:{binary('psql').parent}:{os.environ['PATH']}"


def binary(name: str) -> Path:
    configured = os.environ.get("TEST_PG_BIN")
    return find_binaries(Path(configured) if configured else None) / name


def _give_to(directory: Path, owner: os.stat_result) -> None:
    """Root may create the copy but not run a server on it."""
    for path in (directory, *directory.rglob("*")):
        with suppress(FileNotFoundError):
            os.chown(path, owner.st_uid, owner.st_gid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
