"""A real pgbouncer in the mode of docs/operate/postgresql.md. Skipped without one."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from cli.dev.postgres import EmbeddedPostgres
from cli.dev.signing_key import ensure_development_key
from cli.ops.configuration_faults import Blocks, faults_outside
from core.postgres.pool import open_pool
from tests.conftest import database_settings
from tests.e2e.test_processes import publish, receive, register
from tests.support.ledger import Counts, balance
from tests.support.paths import ROOT
from tests.support.platform import Platform, serve_settings
from tests.support.processes import Processes, environment_of
from tests.support.receiver import Receiver
from tests.support.restartable_postgres import RestartablePostgres

PGBOUNCER = shutil.which("pgbouncer")
DOCS = ROOT / "docs/operate/postgresql.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed"),
]


def in_the_docs(language: str) -> str:
    """The block of docs/operate/postgresql.md in that language, as operators copy it."""
    section = DOCS.read_text().partition("## Behind pgbouncer")[2]
    return section.partition(f"```{language}\n")[2].partition("```")[0]


@asynccontextmanager
async def pooling(server: EmbeddedPostgres, mode: str) -> AsyncIterator[str]:
    """A pgbouncer before the server, and the URL of its database through it."""
    with tempfile.TemporaryDirectory(prefix="postrider-") as place:
        directory = Path(place)
        directory.chmod(0o777)  # noqa: ASYNC240
        settings = directory / "pgbouncer.ini"
        settings.write_text(
            in_the_docs("ini")
            .replace("host=db ", f"host={server.socket_dir} port={server.port} user=postgres ")
            .replace("pool_mode = session", f"pool_mode = {mode}")
            + f"listen_addr =\nunix_socket_dir = {directory}\nauth_type = any\n"
        )
        # It refuses root, as PostgreSQL does, and has to get to that one's socket.
        account = ["-u", server.data_dir.owner()] if os.geteuid() == 0 else []
        process = await asyncio.create_subprocess_exec(
            str(PGBOUNCER), *account, str(settings), stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            async for line in process.stderr:
                if b"process up" in line:
                    break
            reading = asyncio.create_task(process.stderr.read())
            yield f"postgresql://postgres@/postrider?host={directory}&port=6432"
        finally:
            process.terminate()
            await process.wait()
            await reading


@pytest.fixture
async def url_of_the_role(
    restartable_postgres: RestartablePostgres,
) -> AsyncIterator[EmbeddedPostgres]:
    """The server, with the role's settings as the docs have them."""
    assert restartable_postgres.server is not None
    connection = await asyncpg.connect(restartable_postgres.server.url())
    await connection.execute(in_the_docs("sql").replace("ROLE postrider", "ROLE postgres"))
    yield restartable_postgres.server
    await connection.execute("ALTER ROLE postgres RESET ALL")
    await connection.close()


async def test_session_mode_delivers(
    url_of_the_role: EmbeddedPostgres, receiver: Receiver, ca_file: Path, tmp_path: Path
) -> None:
    key = ensure_development_key(tmp_path / "keys")
    async with pooling(url_of_the_role, "session") as url:
        processes = Processes(environment_of(url, ca_file, key.public_key_file))
        migrating = await processes.start("migrate")
        assert await migrating.exit_code() == 0, migrating.lines
        try:
            _, address = await processes.server()
            engine = await processes.engine()
            async with grpc.aio.insecure_channel(address) as channel:
                platform = Platform(address, key, serve_settings(url, ca_file, key), channel)
                secrets = await register(platform, receiver, "m_1", "m_2")
                acknowledged = await publish(platform, ["m_1", "m_2"], 100)
                await receive(receiver, acknowledged)
            await own_settings(url)
        finally:
            await processes.kill_all()
        counts = balance(acknowledged, receiver.webhooks, secrets)
        assert counts == Counts(100, 100, lost=0, duplicate=0, unexpected=0, invalid=0)
        assert engine.named("listen_reopened") == []


async def test_transaction_mode_is_refused_with_a_hint(
    url_of_the_role: EmbeddedPostgres, ca_file: Path, tmp_path: Path
) -> None:
    key = ensure_development_key(tmp_path / "keys")
    async with pooling(url_of_the_role, "transaction") as url:
        processes = Processes(environment_of(url, ca_file, key.public_key_file))
        assert await (await processes.start("migrate")).exit_code() == 0
        engine = await processes.start("delivery")
        assert await engine.exit_code() == 2
    assert "use its session mode" in engine.lines[-1]


async def test_check_names_missing_role_settings(
    restartable_postgres: RestartablePostgres,
) -> None:
    assert restartable_postgres.server is not None
    async with pooling(restartable_postgres.server, "session") as url:
        blocks = Blocks()
        blocks.add(database_settings(url))
        found = await faults_outside(blocks)
    assert [fault for fault in found if "set them for the role" in fault]


async def own_settings(url: str) -> None:
    """Session settings that pgbouncer ignores come from the role."""
    pool = await open_pool(database_settings(url), "test", 1)
    found: Any = await pool.fetchrow(
        "SELECT current_setting('statement_timeout') AS statement,"
        " current_setting('lock_timeout') AS lock, current_setting('enable_seqscan') AS seqscan,"
        " current_setting('enable_bitmapscan') AS bitmapscan,"
        " current_setting('enable_incremental_sort') AS incremental_sort,"
        " current_setting('idle_in_transaction_session_timeout') AS idle,"
        " current_setting('jit') AS jit, current_setting('TimeZone') AS zone"
    )
    await pool.close()
    assert dict(found) == {
        "statement": "10s",
        "lock": "5s",
        "seqscan": "off",
        "bitmapscan": "off",
        "incremental_sort": "off",
        "idle": "10s",
        "jit": "off",
        "zone": "UTC",
    }
