"""SQLAlchemy over the same connections as core/db.py, for the calls that are not hot."""

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from core.config import DatabaseSettings
from core.connection import Connector
from core.queue import Connection

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
    return raw.driver_connection
