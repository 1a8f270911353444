"""The choice between several hosts, and the detection of a vanished host.

The hosts are directories with a socket: the session's PostgreSQL, a silent one and an empty one.
"""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest
import uvloop

from cli.dev.postgres import EmbeddedPostgres
from cli.ops.migrate import migrate
from core.errors import ConfigurationError, Unavailable
from core.postgres.connect import Connector
from core.postgres.pool import open_pool
from server.database import open_sessions
from tests.conftest import database_settings
from tests.support.postgres_proxy import PostgresProxy


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    # A socket path has at most 107 bytes, and tmp_path is almost as long.
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


class Silent:
    """A host that accepts connections and never answers, like a frozen server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.held: list[asyncio.StreamWriter] = []

    async def serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.held.append(writer)


@pytest.fixture
async def silent() -> AsyncIterator[Silent]:
    with tempfile.TemporaryDirectory() as directory:
        silent = Silent(Path(directory))
        path = silent.directory / ".s.PGSQL.5432"
        async with await asyncio.start_unix_server(silent.serve, path):
            yield silent
            for writer in silent.held:
                writer.transport.abort()


def naming(database_url: str, *before: Path, after: Path | None = None) -> str:
    """The URL with further hosts."""
    served = parse_qs(urlsplit(database_url).query)["host"][0]
    hosts = ",".join(map(str, (*before, served, *([after] if after else []))))
    return database_url.replace(f"host={served}", f"host={hosts}")


def connector(url: str, **settings: Any) -> Connector:
    return Connector(database_settings(url).model_copy(update=settings), "test")


async def test_unreachable_host_is_skipped(database_url: str, elsewhere: Path) -> None:
    connection = await connector(naming(database_url, elsewhere)).connect()
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_silent_host_leaves_time_for_the_next(database_url: str, silent: Silent) -> None:
    url = naming(database_url, silent.directory)
    several = connector(url, database_connect_timeout_seconds=60.0)
    async with asyncio.timeout(30):
        for _ in range(2):
            connection = await several.connect()
            await connection.close()
    # The second connection tries the host that answered first.
    assert len(silent.held) == 1


async def test_read_only_host_is_skipped(
    postgres: EmbeddedPostgres, database_url: str, elsewhere: Path
) -> None:
    name = urlsplit(database_url).path[1:]
    connection = await asyncpg.connect(postgres.url())
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await connection.close()

    with pytest.raises(ConnectionError, match="target attribute requirement"):
        await connector(naming(database_url, elsewhere)).connect()
    with pytest.raises(Unavailable, match="target attribute requirement"):
        await open_pool(database_settings(database_url), "test", 1)
    reading = await connector(f"{database_url}&target_session_attrs=read-only").connect()
    await reading.close()


async def test_old_primary_is_skipped_although_it_accepts_writes(
    database_url: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeline is patched, because a real promotion needs a second server."""
    met: dict[int, int] = {}
    monkeypatch.setattr(Connector, "_timelines", met)
    several = connector(naming(database_url, elsewhere))
    await (await several.connect()).close()
    assert list(met.values()) == [1]

    met.update(dict.fromkeys(met, 2))
    with pytest.raises(ConnectionError, match=r"takes writes on timeline 1, .* to timeline 2"):
        await several.connect()
    # After an upgrade the system identifier changes and timelines start at 1.
    met.clear()
    met[1] = 2
    await (await several.connect()).close()


async def test_role_without_timeline_privilege_connects(
    database_url: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "core.postgres.connect._WHICH_TIMELINE", "SELECT pg_read_file('no such file')"
    )
    await (await connector(naming(database_url, elsewhere)).connect()).close()


async def test_refused_login_is_reported_over_unreachable_hosts(
    postgres: EmbeddedPostgres, elsewhere: Path
) -> None:
    url = naming(postgres.url("not_there"), elsewhere, after=elsewhere)
    with pytest.raises(ConfigurationError, match='database "not_there" does not exist'):
        await open_pool(database_settings(url), "test", 1)


async def test_error_names_each_unreachable_host(elsewhere: Path) -> None:
    url = f"postgresql:///test?host={elsewhere},{elsewhere}/other&port=5432,5433"
    with pytest.raises(Unavailable) as caught:
        await open_pool(database_settings(url), "test", 1)
    assert f"{elsewhere}:5432: " in caught.value.message
    assert f"{elsewhere}/other:5433: " in caught.value.message


async def test_hosts_and_ports_must_fit(elsewhere: Path) -> None:
    url = f"postgresql:///test?host={elsewhere},{elsewhere},{elsewhere}&port=5432,5433"
    with pytest.raises(ConfigurationError, match="3 hosts and 2 ports"):
        await open_pool(database_settings(url), "test", 1)


async def test_every_kind_of_connection_accepts_several_hosts(
    database_url: str, elsewhere: Path
) -> None:
    settings = database_settings(naming(database_url, elsewhere))
    await asyncio.to_thread(migrate, settings)
    pool = await open_pool(settings, "test", 1)
    await pool.close()
    sessions = open_sessions(settings, 1)
    async with sessions() as session:
        assert (await session.connection()).closed is False
    await sessions.kw["bind"].dispose()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
async def test_vanished_host_is_detected_in_seconds(
    database_url: str, run: Callable[[Coroutine[Any, Any, Any]], Any]
) -> None:
    query = parse_qs(urlsplit(database_url).query)
    upstream = Path(query["host"][0], f".s.PGSQL.{query['port'][0]}")
    name = urlsplit(database_url).path[1:]

    async def options() -> dict[str, int]:
        server = await asyncio.start_server(PostgresProxy(upstream).serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            url = f"postgresql://postgres@127.0.0.1:{port}/{name}?sslmode=disable"
            connection = await connector(url).connect()
            sock = connection._transport.get_extra_info("socket")
            found = {
                "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                "idle": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                "unacknowledged": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            }
            await connection.close()
            # The proxy's tasks end after the connection.
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)
        return found

    found = await asyncio.to_thread(run, options())
    assert found == {"keepalive": 1, "idle": 5, "unacknowledged": 5000}


async def test_new_connections_use_a_changed_password_file(
    postgres: EmbeddedPostgres, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    # The file takes precedence over the password in the URL.
    url = database_url.replace("postgres@", "by_password:stale@")
    settings = database_settings(url).model_copy(update={"database_password_file": file})
    async with password_required(postgres) as admin:
        pool: Any = await open_pool(settings, "test", 2)
        sessions = open_sessions(settings, 1)
        old = await pool.acquire()
        await admin.execute("ALTER ROLE by_password PASSWORD 'second'")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await pool.fetchval("SELECT 1")
        file.write_text("second\n")
        assert await pool.fetchval("SELECT 1") == 1
        assert await old.fetchval("SELECT 1") == 1
        async with sessions() as session:
            await session.connection()
        await sessions.kw["bind"].dispose()
        await pool.release(old)
        await pool.close()
    assert "stale" not in repr(settings)


@asynccontextmanager
async def password_required(postgres: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A role `by_password` that must log in with the password "first"."""
    rules = postgres.data_dir / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"local all by_password scram-sha-256\n{before}")
    admin = await asyncpg.connect(postgres.url())
    try:
        await admin.execute("CREATE ROLE by_password LOGIN PASSWORD 'first'")
        await admin.execute("SELECT pg_reload_conf()")
        yield admin
    finally:
        await admin.execute("DROP ROLE by_password")
        await admin.close()
        rules.write_text(before)


async def test_old_connection_is_replaced_after_use(database_url: str) -> None:
    settings = database_settings(database_url)
    brief = settings.model_copy(update={"database_connection_seconds": 1e-6})
    backends: dict[str, set[int]] = {}
    for name, those in (("old", brief), ("young", settings)):
        pool = await open_pool(those, "test", 1)
        backends[name] = {await pool.fetchval("SELECT pg_backend_pid()") for _ in range(3)}
        async with pool.acquire() as connection, connection.transaction():
            backends[name] |= {await connection.fetchval("SELECT pg_backend_pid()")}
            # A connection in use is not replaced.
            assert {await connection.fetchval("SELECT pg_backend_pid()")} <= backends[name]
        assert pool.get_size() == (0 if name == "old" else 1)
        await pool.close()
    assert [len(backends["old"]), len(backends["young"])] == [4, 1]
