"""Opens connections to the PostgreSQL server that takes writes, of the hosts the URL names.

They are asked in turn, beginning with the one that accepted last. The next does not wait for one
that is silent, so a primary that vanished costs half a second and not the whole deadline. One that
was a primary before somebody else was promoted is refused, though it takes writes.
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

#: How long a host may be silent before the next one is asked as well.
_NEXT_HOST_SECONDS = 0.5
#: Silence after which the other end of a connection is asked whether it is there, and again.
_PROBE_AFTER_SECONDS = 5
_PROBE_AGAIN_SECONDS = 2

#: What a host says to the settings themselves: more helpful than that another host is away.
_REFUSED = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)

#: Whose data it has and, where it takes writes, since which promotion: each begins a new timeline,
#: with a higher number. pg_control_checkpoint() learns of it only with the next checkpoint.
_WHICH_TIMELINE = """
    SELECT system_identifier,
           CASE WHEN NOT pg_is_in_recovery()
                THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END AS timeline
    FROM pg_control_system()
"""


class StatementCounter:
    """How many statements have been sent."""

    statements = 0


class PooledConnection(asyncpg.Connection):  # type: ignore[misc]
    """Nothing here changes a session, so it costs no round trip to put one back into the pool.

    asyncpg still rolls back a transaction that was left open.
    """

    #: The pool it belongs to, once it does.
    counter = StatementCounter()
    #: By the monotonic clock; set once it is connected.
    old_at = float("inf")

    @property
    def is_old(self) -> bool:
        return time.monotonic() >= self.old_at

    def get_reset_query(self) -> str:
        return ""

    # The ways to send one that we use; that of a transaction, for its BEGIN and COMMIT, is execute.
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
    """Connects as the settings say, whenever asked."""

    # For all of the process: a connector that is made late must not be the only one to take an old
    # primary for the one that accepts.
    _accepted_last: ClassVar[dict[tuple[str, ...], str]] = {}
    #: The newest that was met, by the system identifier, which an upgrade changes.
    _timelines: ClassVar[dict[int, int]] = {}

    def __init__(
        self, settings: DatabaseSettings, application_name: str, *, limit_statements: bool = True
    ):
        self._hosts = ReloadedSecret(settings.secret("database_url"), _url_of_each_host)
        password = settings.secret("database_password")
        self._password = ReloadedSecret(password, str) if password.given else None
        self._patience = settings.database_connect_timeout_seconds
        self._age = settings.database_connection_seconds
        patience = settings.database_statement_timeout_seconds
        self._arguments = {
            # A little longer than PostgreSQL itself, which then can say why.
            "command_timeout": patience + 1 if limit_statements else None,
            "server_settings": _server_settings(application_name, patience),
        }

    async def connect(self, **_: Any) -> PooledConnection:
        """A connection that can write, unless the URL asks for another kind.

        Raises what asyncpg.connect does, and ConnectionError when none of several hosts will do.
        It ends by itself when the other end vanishes. The arguments are those of asyncpg's pool,
        which knows nothing that is not known here.
        """
        hosts = self._hosts.current()
        async with asyncio.timeout(self._patience):
            if len(hosts) == 1:
                connection = await self._open(*hosts.values())
            else:
                # Stable, so the others stay in the operator's order.
                known = self._accepted_last.get(tuple(hosts))
                order = sorted(hosts, key=lambda host: host != known)
                accepted, connection = await self._race({h: hosts[h] for h in order})
                self._accepted_last[tuple(hosts)] = accepted
        _end_when_the_other_vanishes(connection, self._patience)
        # Not all of them at once.
        connection.old_at = time.monotonic() + self._age * random.uniform(0.9, 1.1)  # noqa: S311
        return connection

    async def _open(self, url: str) -> PooledConnection:
        # Where the URL asks for another kind of server, that counts.
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
        """ConnectionError for one that takes writes though another has been promoted since."""
        system, timeline = await _timeline(connection)
        newest = self._timelines[system] = max(timeline, self._timelines.get(system, 0))
        if 0 < timeline < newest:
            raise ConnectionError(
                f"it takes writes on timeline {timeline}, though another server has been promoted "
                f"to timeline {newest}: stop it, or let it follow (pg_rewind)"
            )

    async def _race(self, urls: Mapping[str, str]) -> tuple[str, PooledConnection]:
        """The first host to accept, and the connection; the others are given up."""
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
    """The system identifier and, of a primary that says it, the timeline; 0 otherwise."""
    try:
        system, timeline = await connection.fetchrow(_WHICH_TIMELINE)
    # Services that are PostgreSQL by protocol only have no such functions, or not for everybody.
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
        # Every statement here is short; compiling one costs more than it saves.
        "jit": "off",
        # Every one has its index, in the order that it asks for. Statistics of a table that was
        # empty then (a new day's partition, the queue) would talk the planner out of it, and a
        # cached plan would stay so.
        "enable_seqscan": "off",
        "enable_bitmapscan": "off",
        "enable_incremental_sort": "off",
    }


def _url_of_each_host(url: str) -> dict[str, str]:
    """For each host of the URL, one that names it alone; asyncpg reads the rest of them.

    It could read several, but asks the second when the first has spoken or the time is over.
    ConfigurationError, without the URL, for what is none of PostgreSQL.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ConfigurationError(
            "WEBHOOK_DATABASE_URL is not a URL of PostgreSQL: write it as "
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
            "its port, or all of them one"
        )
    return {
        f"{host}:{port}": parts._replace(
            query=urlencode(query | {"host": host, "port": port})
        ).geturl()
        for host, port in zip(hosts, ports, strict=True)
    }


def _end_when_the_other_vanishes(connection: PooledConnection, seconds: float) -> None:
    """A machine that lost its power says no good-bye; by default that is noticed after minutes."""
    sock = connection._transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AGAIN_SECONDS)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
