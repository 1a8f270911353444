"""Pools of connections to PostgreSQL with bounded waits, and what their errors mean."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg

from core.errors import ConfigurationError, Unavailable
from core.postgres.connect import Connector, PooledConnection, StatementCounter
from core.postgres.protocols import Pool
from core.settings import DatabaseSettings

#: What a connection error can look like; everything else from asyncpg is a bug or a refusal.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # What the next use of a connection that was cut raises.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    # Of a process at work: its new password has not reached the file, or the server, yet.
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
)

#: After these the same statement may simply be sent again.
RETRYABLE_ERRORS = (
    *CONNECTION_ERRORS,
    asyncpg.exceptions.TransactionRollbackError,
    asyncpg.exceptions.LockNotAvailableError,
)

#: Given up after that, connections are ended without a word.
_CLOSE_SECONDS = 2.0


def met_new_part(error: BaseException) -> bool:
    """Whether a row was on its way to a default partition when that of its day was made.

    PostgreSQL refuses it then, by a check that has no name; the same statement finds the new one.
    """
    return isinstance(error, asyncpg.CheckViolationError) and not error.constraint_name


class _BoundedPool(asyncpg.pool.Pool, StatementCounter):  # type: ignore[misc]
    """asyncpg's pool, but nobody waits for a free connection longer than for a new one."""

    def __init__(self, connector: Connector, *, timeout: float, size: int):
        super().__init__(
            connect=connector.connect,
            min_size=1,
            max_size=size,
            max_queries=50_000,
            max_inactive_connection_lifetime=300.0,
            loop=None,
            connection_class=PooledConnection,
            record_class=asyncpg.Record,
            init=self._count_for,
        )
        self._acquire_timeout = timeout

    async def _count_for(self, connection: PooledConnection) -> None:
        connection.counter = self

    def acquire(self, *, timeout: float | None = None) -> Any:
        return super().acquire(timeout=timeout or self._acquire_timeout)

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        held = connection._con  # None once it was given back, or ended.
        if held is not None and held.is_old:
            # Without a good-bye, whose answer would have to be waited for.
            held.terminate()
        else:
            await super().release(connection, timeout=timeout)


async def open_pool(settings: DatabaseSettings, application_name: str, size: int) -> Pool:
    """A pool of at most `size` connections; Unavailable when the database cannot be reached."""
    connector = Connector(settings, application_name)
    timeout = settings.database_connect_timeout_seconds
    try:
        pool: Pool = await _BoundedPool(connector, timeout=timeout, size=size)
        return pool
    except asyncpg.exceptions.InvalidAuthorizationSpecificationError as error:
        raise ConfigurationError(f"PostgreSQL refused the connection: {error}") from error
    except CONNECTION_ERRORS as error:
        raise Unavailable(
            "the database cannot be reached; check WEBHOOK_DATABASE_URL and that PostgreSQL runs "
            f"({type(error).__name__}: {error})",
            reason="DATABASE_UNAVAILABLE",
        ) from error
    except asyncpg.PostgresError as error:
        raise ConfigurationError(f"PostgreSQL refused the connection: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"WEBHOOK_DATABASE_URL is not usable: {error}") from None


async def close_soon(close: Callable[[], Awaitable[None]]) -> None:
    """Say good-bye to the database, unless it does not listen: a stop must not wait for it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await close()
