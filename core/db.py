"""The one way to a PostgreSQL connection: bounded waits, UTC, and a name an operator sees."""

from typing import Any

import asyncpg

from core.config import DatabaseSettings
from core.errors import ConfigurationError, Unavailable

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
)

#: After these the same statement may simply be sent again.
RETRYABLE_ERRORS = (
    *CONNECTION_ERRORS,
    asyncpg.exceptions.TransactionRollbackError,
    asyncpg.exceptions.LockNotAvailableError,
)

#: asyncpg has no types of its own; what it returns is described where it is used.
type Pool = Any


def connect_arguments(settings: DatabaseSettings, application_name: str) -> dict[str, Any]:
    """Arguments of asyncpg.connect and create_pool, shared by every connection we open."""
    return {
        "dsn": settings.database_url.get_secret_value(),
        "timeout": settings.database_connect_timeout_seconds,
        "command_timeout": settings.database_statement_timeout_seconds + 1,
        "server_settings": {
            "application_name": application_name,
            "TimeZone": "UTC",
            "statement_timeout": f"{settings.database_statement_timeout_seconds * 1000:.0f}",
            "lock_timeout": f"{settings.database_statement_timeout_seconds * 500:.0f}",
            "idle_in_transaction_session_timeout": "10000",
            "synchronous_commit": "on",
            # Every statement here is short; compiling one costs more than it saves.
            "jit": "off",
            # Every one has its index. Statistics of a table that was empty then (a new day's
            # partition) would talk the planner out of it, and a cached plan would stay so.
            "enable_seqscan": "off",
        },
    }


class StatementCounter:
    """How many statements have been sent."""

    statements = 0


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """Nothing here changes a session, so it costs no round trip to put one back into the pool.

    asyncpg still rolls back a transaction that was left open.
    """

    #: The pool it belongs to, once it does.
    counter = StatementCounter()

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


class _BoundedPool(asyncpg.pool.Pool, StatementCounter):  # type: ignore[misc]
    """asyncpg's pool, but nobody waits for a free connection longer than for a new one."""

    def __init__(self, dsn: str, *, timeout: float, size: int, **arguments: Any):
        super().__init__(
            dsn,
            min_size=1,
            max_size=size,
            max_queries=50_000,
            max_inactive_connection_lifetime=300.0,
            loop=None,
            connection_class=_Connection,
            record_class=asyncpg.Record,
            init=self._count_for,
            timeout=timeout,
            **arguments,
        )
        self._acquire_timeout = timeout

    async def _count_for(self, connection: _Connection) -> None:
        connection.counter = self

    def acquire(self, *, timeout: float | None = None) -> Any:
        return super().acquire(timeout=timeout or self._acquire_timeout)


async def open_pool(settings: DatabaseSettings, application_name: str, size: int) -> Pool:
    """A pool of at most `size` connections; Unavailable when the database cannot be reached."""
    arguments = connect_arguments(settings, application_name)
    try:
        return await _BoundedPool(**arguments, size=size)
    except CONNECTION_ERRORS as error:
        raise Unavailable(
            "the database cannot be reached; check WEBHOOK_DATABASE_URL and that PostgreSQL runs "
            f"({type(error).__name__})",
            reason="DATABASE_UNAVAILABLE",
        ) from error
    except asyncpg.PostgresError as error:
        raise ConfigurationError(f"PostgreSQL refused the connection: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"WEBHOOK_DATABASE_URL is not usable: {error}") from None
