"""Opens connections to the PostgreSQL server that takes writes, among the hosts of the URL.

Hosts are tried in order, the one that accepted last first. After half a second without a response
the next one is tried as well, so that a lost primary does not cost the whole timeout. An old
primary is refused after another server was promoted, even if it takes writes.
"""

import asyncio
import random
import socket
import time
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg

from core.errors import ConfigurationError
from core.file_secrets import ReloadedSecret
from core.settings import DatabaseSettings

#: Time without a response after which the next host is tried as well.
_NEXT_HOST_SECONDS = 0.5
#: TCP keepalive: idle time before the first probe, and the interval of further ones.
_PROBE_AFTER_SECONDS = 5
_PROBE_AGAIN_SECONDS = 2

#: Errors of wrong settings. They are more useful than the error of an unavailable host.
_REFUSED = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)

#: The system identifier and, for a primary, its timeline. Each promotion starts a timeline with a
#: higher number. pg_control_checkpoint() shows it only after the next checkpoint.
_WHICH_TIMELINE = """
    SELECT system_identifier,
           CASE WHEN NOT pg_is_in_recovery()
                THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END AS timeline
    FROM pg_control_system()
"""


class StatementCounter:
    """The number of statements that were sent."""

    statements = 0


class PooledConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection without a reset query, because Postrider does not change sessions.

    That saves a round trip per use. asyncpg still rolls back an open transaction.
    """

    #: The counter of its pool.
    counter = StatementCounter()
    #: Monotonic time after which it is replaced. Set after connecting.
    old_at = float("inf")

    @property
    def is_old(self) -> bool:
        return time.monotonic() >= self.old_at

    def get_reset_query(self) -> str:
        return ""

    # All methods in use that send a statement. Transactions use execute() for BEGIN and COMMIT.
    def execute(self, *arguments: Any, **options: Any) -> Any:
        self.counter.statements += 1
        return super().execute(*arguments, **options)

    def fetch(self, *arguments: Any, **options: Any) -> Any:
        self.counter.statements += 1
        return super().fetch(*arguments, **options)

    def fetchrow(self, *arguments: Any, **options: Any) -> Any:
        self.counter.statements += 1
        return super().fetchrow(*arguments, **options)

    def fetchval(self, *arguments: Any, **options: Any) -> Any:
        self.counter.statements += 1
        return super().fetchval(*arguments, **options)


class Connector:
    """Opens connections by the settings."""

    # Shared by the process, so that a new connector also refuses an old primary.
    _accepted_last: ClassVar[dict[tuple[str, ...], str]] = {}
    #: The newest known timeline by system identifier, which changes with a major upgrade.
    _timelines: ClassVar[dict[int, int]] = {}

    def __init__(
        self, settings: DatabaseSettings, application_name: str, *, limit_statements: bool = True
    ):
        self._hosts = ReloadedSecret(settings.secret("database_url"), _url_of_each_host)
        password = settings.secret("database_password")
        self._password = ReloadedSecret(password, str) if password.given else None
        self._timeout = settings.database_connect_timeout_seconds
        self._age = settings.database_connection_seconds
        timeout = settings.database_statement_timeout_seconds
        self._arguments = {
            # Longer than the timeout of PostgreSQL, whose error has the reason.
            "command_timeout": timeout + 1 if limit_statements else None,
            "server_settings": _server_settings(application_name, timeout),
        }

    async def connect(self, **_: Any) -> PooledConnection:
        """Return a connection that can write, unless the URL asks for another kind.

        Raises the errors of asyncpg.connect(), and ConnectionError if no host is usable. TCP
        keepalive detects a vanished server. The arguments of asyncpg's pool are ignored.
        """
        hosts = self._hosts.current()
        async with asyncio.timeout(self._timeout):
            if len(hosts) == 1:
                connection = await self._open(*hosts.values())
            else:
                # The sort is stable, so the others stay in the operator's order.
                known = self._accepted_last.get(tuple(hosts))
                order = sorted(hosts, key=lambda host: host != known)
                accepted, connection = await self._race({h: hosts[h] for h in order})
                self._accepted_last[tuple(hosts)] = accepted
        _set_keepalive(connection, self._timeout)
        # Varied, so that connections are not all replaced at once.
        connection.old_at = time.monotonic() + self._age * random.uniform(0.9, 1.1)  # noqa: S311
        return connection

    async def _open(self, url: str) -> PooledConnection:
        # The URL may ask for another kind of server.
        target = None if "target_session_attrs=" in url else "read-write"
        connection: PooledConnection = await asyncpg.connect(
            url,
            password=self._password.current() if self._password else None,
            target_session_attrs=target,
            connection_class=PooledConnection,
            **self._arguments,
        )
        return connection

    async def _open_one_of_several(self, url: str) -> PooledConnection:
        connection = await self._open(url)
        try:
            await self._refuse_an_old_primary(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _refuse_an_old_primary(self, connection: PooledConnection) -> None:
        """Raise ConnectionError for an old primary after another server was promoted."""
        system, timeline = await _timeline(connection)
        newest = self._timelines[system] = max(timeline, self._timelines.get(system, 0))
        if 0 < timeline < newest:
            raise ConnectionError(
                f"it takes writes on timeline {timeline}, but another server was promoted to "
                f"timeline {newest}: stop it, or make it a standby (pg_rewind)"
            )

    async def _race(self, urls: Mapping[str, str]) -> tuple[str, PooledConnection]:
        """Return the first host that accepts, with its connection. Others are cancelled."""
        waiting = list(urls)
        attempts: dict[asyncio.Task[PooledConnection], str] = {}
        faults: dict[str, BaseException] = {}
        try:
            while waiting or len(faults) < len(attempts):
                if waiting:
                    host = waiting.pop(0)
                    attempts[asyncio.create_task(self._open_one_of_several(urls[host]))] = host
                await asyncio.wait(
                    [attempt for attempt in attempts if not attempt.done()],
                    timeout=_NEXT_HOST_SECONDS if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt, host in attempts.items():
                    if attempt.done() and host not in faults:
                        fault = attempt.exception()
                        if fault is None:
                            attempts.pop(attempt)
                            return host, attempt.result()
                        faults[host] = fault
        finally:
            for attempt in attempts:
                attempt.cancel()
                attempt.add_done_callback(_discard)
        for fault in faults.values():
            if isinstance(fault, _REFUSED):
                raise fault
        said = [f"{host}: {str(fault) or type(fault).__name__}" for host, fault in faults.items()]
        raise ConnectionError("; ".join(said))


async def _timeline(connection: PooledConnection) -> tuple[int, int]:
    """Return the system identifier, and the timeline of a primary or 0."""
    try:
        system, timeline = await connection.fetchrow(_WHICH_TIMELINE)
    # Services that only speak the protocol of PostgreSQL may lack these functions.
    except asyncpg.PostgresError:
        return 0, 0
    return system, int(timeline or "0", 16)


def _discard(attempt: asyncio.Task[PooledConnection]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


def _server_settings(application_name: str, statement_seconds: float) -> dict[str, str]:
    return {
        "application_name": application_name,
        "TimeZone": "UTC",
        "statement_timeout": f"{statement_seconds * 1000:.0f}",
        "lock_timeout": f"{statement_seconds * 500:.0f}",
        "idle_in_transaction_session_timeout": "10000",
        "synchronous_commit": "on",
        # Statements are short, so compiling them costs more than it saves.
        "jit": "off",
        # Every statement has an index in its order. Statistics of an empty table, such as a new
        # partition or the queue, would make the planner ignore it, also in cached plans.
        "enable_seqscan": "off",
        "enable_bitmapscan": "off",
        "enable_incremental_sort": "off",
    }


def _url_of_each_host(url: str) -> dict[str, str]:
    """Return a URL for each host of the URL.

    asyncpg accepts several hosts, but tries the second only after the first has failed or timed
    out. Raises ConfigurationError, without the URL, if it is not one of PostgreSQL.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ConfigurationError(
            "WEBHOOK_DATABASE_URL is not a PostgreSQL URL: write it as "
            "postgresql://user:password@host:5432/database, with special characters of the "
            "password percent-encoded"
        )
    before, at, netloc = parts.netloc.rpartition("@")
    query = dict(parse_qsl(parts.query))
    hosts = (netloc or query.get("host", "")).split(",")
    if len(hosts) == 1:
        return {hosts[0]: url}
    if netloc:
        return {host: parts._replace(netloc=f"{before}{at}{host}").geturl() for host in hosts}
    ports = query.get("port", "5432").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    if len(ports) != len(hosts):
        raise ConfigurationError(
            f"WEBHOOK_DATABASE_URL names {len(hosts)} hosts and {len(ports)} ports: give each host "
            "a port, or one port for all hosts"
        )
    return {
        f"{host}:{port}": parts._replace(
            query=urlencode(query | {"host": host, "port": port})
        ).geturl()
        for host, port in zip(hosts, ports, strict=True)
    }


def _set_keepalive(connection: PooledConnection, seconds: float) -> None:
    """Set TCP keepalive, because the loss of a machine is otherwise noticed after minutes."""
    sock = connection._transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AGAIN_SECONDS)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
