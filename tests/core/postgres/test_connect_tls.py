"""TLS to PostgreSQL, by the URL parameters of docs/operate/postgresql.md."""

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from cli.dev.postgres import embedded_postgres
from cli.ops.migrate import migrate
from core.errors import PostriderError
from core.postgres.connect import Connector
from core.postgres.pool import open_pool
from server.database import open_sessions
from tests.conftest import database_settings
from tests.support.certificates import Authority, Issued

#: PostgreSQL of the distribution, because the embedded one is built without TLS.
BINARIES = next(
    (path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL with TLS is installed"),
]
SERVERS, CLIENTS = Authority("of servers"), Authority("of clients")


@dataclass(frozen=True)
class Secured:
    """A server that requires TLS and authenticates the role by certificate."""

    port: int
    files: Path

    def url(self, host: str = "127.0.0.1", ca: str = "servers.pem", **more: str) -> str:
        options = {
            "sslmode": "verify-full",
            "sslrootcert": str(self.files / ca),
            "sslcert": str(self.files / "client.pem"),
            "sslkey": str(self.files / "client.key"),
            **more,
        }
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://postgres@{host}:{self.port}/postgres?{query}"

    def give(self, name: str, issued: Issued) -> None:
        issued.write(self.files / f"{name}.pem", self.files / f"{name}.key")


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = Secured(port, tmp_path)
    (tmp_path / "servers.pem").write_bytes(SERVERS.certificate)
    (tmp_path / "clients.pem").write_bytes(CLIENTS.certificate)
    found.give("client", CLIENTS.issue(common_name="postgres"))
    with tempfile.TemporaryDirectory(prefix="postrider-tests-") as place:
        # Tests that run as root start PostgreSQL as another user, which needs access.
        os.chmod(place, 0o711)  # noqa: S103
        data = Path(place, "data")
        with embedded_postgres(data, bin_dir=BINARIES, announce=lambda _: None):
            pass
        SERVERS.issue(ips=("127.0.0.1",)).write(data / "server.crt", data / "server.key")
        (data / "clients.crt").write_bytes(CLIENTS.certificate)
        owner = os.stat(data)
        for name in ("server.crt", "server.key", "clients.crt"):
            os.chown(data / name, owner.st_uid, owner.st_gid)
            (data / name).chmod(0o600)
        (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 cert\n")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "ssl": "on",
            "ssl_ca_file": "clients.crt",
        }
        with embedded_postgres(data, options=options, bin_dir=BINARIES, announce=lambda _: None):
            yield found


async def test_all_connections_use_verified_mutual_tls(secured: Secured) -> None:
    # The first host is unreachable, so that a list of hosts is verified as well.
    several = f"127.0.0.1:1,127.0.0.1:{secured.port}"
    url = secured.url().replace(f"127.0.0.1:{secured.port}", several)
    settings = database_settings(url)
    await asyncio.to_thread(migrate, settings)
    pool = await open_pool(settings, "test", 1)
    assert await pool.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    await pool.close()
    sessions = open_sessions(settings, 1)
    async with sessions() as session:
        await session.connection()
    await sessions.kw["bind"].dispose()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"ca": "clients.pem"}, "certificate verify failed"),
        ({"host": "localhost"}, "certificate verify failed"),
        ({"sslmode": "disable"}, r"no pg_hba\.conf entry"),
    ],
    ids=["another authority", "another name", "without TLS"],
)
async def test_unverified_connection_is_refused(
    secured: Secured, change: dict[str, str], error: str
) -> None:
    with pytest.raises(PostriderError, match=error):
        await open_pool(database_settings(secured.url(**change)), "test", 1)


async def test_next_connection_uses_a_renewed_certificate(secured: Secured) -> None:
    connector = Connector(database_settings(secured.url()), "test")
    (await connector.connect()).terminate()
    secured.give("client", SERVERS.issue(common_name="postgres"))
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await connector.connect()
    secured.give("client", CLIENTS.issue(common_name="postgres"))
    (await connector.connect()).terminate()
