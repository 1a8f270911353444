"""SQLAlchemy sessions for calls that are not hot, and the watch of the database for health."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from core.postgres.connect import Connector
from core.postgres.pool import CONNECTION_ERRORS
from core.postgres.protocols import Connection
from core.settings import DatabaseSettings

log = structlog.get_logger()

type Sessions = async_sessionmaker[AsyncSession]


def open_sessions(settings: DatabaseSettings, size: int) -> Sessions:
    """Return sessions on at most `size` connections. Objects stay readable after a commit."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=Connector(settings, "postrider-server").connect,
        pool_size=size,
        max_overflow=0,
        pool_timeout=settings.database_connect_timeout_seconds,
        pool_pre_ping=True,
        pool_recycle=int(settings.database_connection_seconds),
        # Errors are logged, and parameters may be credentials of a receiver.
        hide_parameters=True,
    )
    return async_sessionmaker(engine, expire_on_commit=False)


async def driver_connection(session: AsyncSession) -> Connection:
    """Return the asyncpg connection of a session, inside its transaction, for core/queue.

    Call it after the session has run a statement, because that starts the transaction.
    """
    raw = await (await session.connection()).get_raw_connection()
    connection: Connection = raw.driver_connection  # type: ignore[assignment]
    return connection


class DatabaseWatch:
    """Reports the loss and the return of the database to the health service.

    It has its own connection, because a wait for the pool would look like a lost database. A lost
    connection is replaced before a report, so a restarted session is not an outage.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        report: Callable[[bool], Awaitable[None]],
        *,
        interval_seconds: float,
    ):
        self._connector = Connector(settings, "postrider-health")
        # A check may need a second connection. The setting limits both together.
        self._timeout = settings.database_connect_timeout_seconds / 2
        self._report = report
        self._interval = interval_seconds
        self._connection: Any = None

    async def run(self) -> None:
        """Watch until cancelled. The database was available when the server started."""
        was_available = True
        try:
            while True:
                available = await self._check()
                if available is not was_available:
                    was_available = available
                    if available:
                        log.info("database_back")
                    else:
                        log.warning("database_away")
                    await self._report(available)
                await asyncio.sleep(self._interval)
        finally:
            self._drop()

    async def _check(self) -> bool:
        if await self._answers():
            return True
        # The connection may have been cut, so a new one decides.
        self._drop()
        return await self._answers()

    async def _answers(self) -> bool:
        """Return whether the database is reachable and takes writes, so no standby."""
        try:
            async with asyncio.timeout(self._timeout):
                if self._connection is None:
                    self._connection = await self._connector.connect()
                writable: bool = await self._connection.fetchval("SELECT NOT pg_is_in_recovery()")
                return writable
        # Any error means that the database is not available.
        except (*CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            log.debug("database_silent", error=repr(error))
            return False

    def _drop(self) -> None:
        """Close the connection without a goodbye, because the server may be frozen."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
