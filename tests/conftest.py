"""Real parts for each test: PostgreSQL with its own database, a CA, a receiver, a server."""

import asyncio
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
import trustme
from pydantic import SecretStr

from cli.dev.postgres import EmbeddedPostgres, embedded_postgres
from cli.ops.migrate import migrate
from core.encryption import KeyRing
from core.settings import DatabaseSettings
from tests.support.platform import Platform, running_platform
from tests.support.receiver import Receiver, receiving
from tests.support.restartable_postgres import RestartablePostgres

#: For the databases and logs of all workers.
_ROOM_BYTES = 4 << 30
_TEMPLATE = "postrider_template"
_database_numbers = itertools.count(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the ledgers that tests kept."""
    lines = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "ledger"
    ]
    if lines:
        terminalreporter.section("ledger")
        for line in lines:
            terminalreporter.line(str(line))


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    """No test depends on the environment of the shell."""
    for name in list(os.environ):
        if name.startswith("WEBHOOK_"):
            del os.environ[name]


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """No test depends on the log configuration of an earlier test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def _memory() -> str | None:
    """A directory in memory if it has space, because each test creates a database of 8 MB."""
    memory = Path("/dev/shm")  # noqa: S108 - only the parent of a temporary directory
    enough = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES
    return str(memory) if enough else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """One server for the session, with a migrated template database.

    TEST_PG_BIN names another PostgreSQL's programs, to run the tests on another version.
    """
    bin_dir = Path(os.environ["TEST_PG_BIN"]) if "TEST_PG_BIN" in os.environ else None
    # This server need not survive a crash. Tests of durability start other servers.
    options = {"fsync": "off", "max_connections": "300", "log_min_messages": "fatal"}
    with tempfile.TemporaryDirectory(prefix="postrider-tests-", dir=_memory()) as directory:
        # PostgreSQL refuses root, so root runs it as another user, who must reach the directory.
        Path(directory).chmod(0o711)
        data_dir = Path(directory, "data")
        with embedded_postgres(
            data_dir, bin_dir=bin_dir, options=options, announce=lambda _: None
        ) as server:
            asyncio.run(_execute(server.url(), f"CREATE DATABASE {_TEMPLATE}"))
            migrate(database_settings(server.url(_TEMPLATE)))
            yield server


@pytest.fixture(scope="module")
def restartable_postgres() -> Iterator[RestartablePostgres]:
    """A migrated server that the module's tests may stop, start and freeze."""
    with tempfile.TemporaryDirectory(prefix="postrider-tests-", dir=_memory()) as directory:
        Path(directory).chmod(0o711)
        own = RestartablePostgres(Path(directory, "data"))
        migrate(database_settings(own.start()))
        try:
            yield own
        finally:
            own.stop()


@pytest.fixture
async def database_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A migrated database for one test."""
    name = f"test_{next(_database_numbers)}"
    # Copying the files takes a third of the time of writing their content to the WAL.
    copied = f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY file_copy"
    await _execute(postgres.url(), copied)
    yield postgres.url(name)
    await _execute(postgres.url(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    """An asyncpg pool on the test's database."""
    async with asyncpg.create_pool(database_url, min_size=1, max_size=10) as pool:
        yield pool


@pytest.fixture(scope="session")
def keyring() -> KeyRing:
    return KeyRing({"k1": bytes(range(32))})


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority that only these tests trust."""
    return trustme.CA()


@pytest.fixture(scope="session")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
async def receiver(authority: trustme.CA) -> AsyncIterator[Receiver]:
    """A merchant's HTTPS endpoint on loopback."""
    async with receiving(authority) as receiver:
        yield receiver


@pytest.fixture
def start_receiver(authority: trustme.CA) -> Callable[[], Any]:
    """Starts further receivers: `async with start_receiver() as second`."""
    return lambda: receiving(authority)


@pytest.fixture
async def platform(
    request: pytest.FixtureRequest, database_url: str, ca_file: Path, tmp_path: Path
) -> AsyncIterator[Platform]:
    """A running gRPC server on the test's database, with the settings of a `server` mark."""
    mark = request.node.get_closest_marker("server")
    settings = mark.kwargs if mark else {}
    async with running_platform(database_url, ca_file, tmp_path, **settings) as platform:
        yield platform


@pytest.fixture
def start_platform(database_url: str, ca_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Starts a server with other settings: `async with start_platform(max_payload_bytes=10)`."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Platform]:
        async with running_platform(database_url, ca_file, tmp_path, **settings) as platform:
            yield platform

    return start


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """The log entries of the test, as dictionaries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


def database_settings(url: str) -> DatabaseSettings:
    return DatabaseSettings(database_url=SecretStr(url))


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
