"""SQLAlchemy over the same connections as core/postgres/pool.py, for the calls that are not hot."""

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

type Sessions = async_sessionmaker[AsyncSession]


def open_sessions(settings: DatabaseSettings, size: int) -> Sessions:
    """Sessions on a pool of at most `size` connections; objects stay readable after a commit."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=Connector(settings, "postrider-server").connect,
        pool_size=size,
        max_overflow=0,
        pool_timeout=settings.database_connect_timeout_seconds,
        pool_pre_ping=True,
        pool_recycle=int(settings.database_connection_seconds),
        # An error's text ends up in the log, and they may be credentials of a receiver.
        hide_parameters=True,
    )
    return async_sessionmaker(engine, expire_on_commit=False)


async def driver_connection(session: AsyncSession) -> Connection:
    """The asyncpg connection under a session, inside its transaction: for core/queue.

    Only after the session has run a statement, since that is what begins the transaction.
    """
    raw = await (await session.connection()).get_raw_connection()
    connection: Connection = raw.driver_connection  # type: ignore[assignment]
    return connection


# Asks the database every few seconds whether it is there, for the health service.
#
# It has a connection of its own: one from the pool would mistake a busy server for a lost database.
# One that was cut is replaced before anything is said, so a restarted session is no outage.

log = structlog.get_logger()


class DatabaseWatch:
    """Reports a loss and a return, each within the interval and the connect timeout."""

    def __init__(
        self,
        settings: DatabaseSettings,
        report: Callable[[bool], Awaitable[None]],
        *,
        interval_seconds: float,
    ):
        self._connector = Connector(settings, "postrider-health")
        # A look may need a second connection; the setting bounds both together.
        self._patience = settings.database_connect_timeout_seconds / 2
        self._report = report
        self._interval = interval_seconds
        self._connection: Any = None

    async def run(self) -> None:
        """Watch until cancelled. It starts from a database that is there, as the server did."""
        told = True
        try:
            while True:
                there = await self._look()
                if there is not told:
                    told = there
                    if there:
                        log.info("database_back")
                    else:
                        log.warning("database_away")
                    await self._report(there)
                await asyncio.sleep(self._interval)
        finally:
            self._drop()

    async def _look(self) -> bool:
        if await self._answers():
            return True
        # Cut, maybe in the middle of the question: only a new session tells.
        self._drop()
        return await self._answers()

    async def _answers(self) -> bool:
        """Also False when it is a standby: then nothing can be accepted."""
        try:
            async with asyncio.timeout(self._patience):
                if self._connection is None:
                    self._connection = await self._connector.connect()
                writable: bool = await self._connection.fetchval("SELECT NOT pg_is_in_recovery()")
                return writable
        # Refused, cut, silent, out of connections, starting up: whatever it is, it is not there.
        except (*CONNECTION_ERRORS, asyncpg.PostgresError) as error:
            log.debug("database_silent", error=repr(error))
            return False

    def _drop(self) -> None:
        """Without a word to the server, which may be frozen."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
