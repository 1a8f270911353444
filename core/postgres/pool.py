"""Connection pools with bounded waits, and the classes of their errors."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg

from core.errors import ConfigurationError, Unavailable
from core.postgres.connect import Connector, PooledConnection, StatementCounter
from core.postgres.protocols import Pool
from core.settings import DatabaseSettings

#: Errors of a connection. Other errors of asyncpg are bugs or refusals.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # Raised by the next use of a connection that was cut.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    # After a password change that has not reached the file or the server yet.
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
)

#: Errors after which the same statement may be sent again.
RETRYABLE_ERRORS = (
    *CONNECTION_ERRORS,
    asyncpg.exceptions.TransactionRollbackError,
    asyncpg.exceptions.LockNotAvailableError,
)

#: After this time, connections are closed without a goodbye.
_CLOSE_SECONDS = 2.0


def met_new_partition(error: BaseException) -> bool:
    """Return whether the partition of a row was created while the row was inserted.

    PostgreSQL then refuses the row by an unnamed check of the default partition. The same statement
    succeeds when it is repeated.
    """
    return isinstance(error, asyncpg.CheckViolationError) and not error.constraint_name


class _BoundedPool(asyncpg.pool.Pool, StatementCounter):  # type: ignore[misc]
    """asyncpg's pool, with one time limit for a free connection and for a new one."""

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
            # Without a goodbye, because its response would take time.
            held.terminate()
        else:
            await super().release(connection, timeout=timeout)


async def open_pool(settings: DatabaseSettings, application_name: str, size: int) -> Pool:
    """Open a pool of at most `size` connections. Raises Unavailable or ConfigurationError."""
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
    """Close the connections, but wait at most 2 s for an unavailable database."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await close()
