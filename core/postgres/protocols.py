"""The parts of asyncpg that Postrider uses, typed, because asyncpg has no types."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Executor(Protocol):
    """Runs single statements: a connection, or a pool that takes a connection for each of them.

    Rows are `asyncpg.Record`. Every method raises `asyncpg.PostgresError`, or one of
    `core.postgres.pool.CONNECTION_ERRORS` when the connection fails.
    """

    async def execute(self, query: str, *args: Any) -> str:
        """Return the command tag, such as `DELETE 3`."""

    async def fetch(self, query: str, *args: Any) -> list[Any]: ...

    async def fetchrow(self, query: str, *args: Any) -> Any: ...

    async def fetchval(self, query: str, *args: Any) -> Any: ...


class Connection(Executor, Protocol):
    """One session, which can hold a transaction open."""

    def transaction(
        self, *, isolation: str | None = None, readonly: bool = False
    ) -> AbstractAsyncContextManager[Any]: ...

    async def executemany(self, command: str, args: Any) -> None: ...


class Pool(Executor, Protocol):
    """A bounded set of connections. `statements` counts the statements sent so far."""

    statements: int

    def acquire(self) -> AbstractAsyncContextManager[Connection]: ...

    async def __aenter__(self) -> "Pool": ...

    async def __aexit__(self, *error: object) -> None: ...

    def get_size(self) -> int: ...

    def get_idle_size(self) -> int: ...

    def get_max_size(self) -> int: ...

    async def close(self) -> None: ...

    def terminate(self) -> None: ...
