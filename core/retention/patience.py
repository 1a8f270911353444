"""Trying again after a short wait: retention waits for a lock briefly and often, never long."""

import asyncio
from collections.abc import Awaitable, Callable
from random import uniform
from typing import Any

import asyncpg

#: Longest wait for a lock: so long everybody else may queue behind it.
LOCK_SECONDS = 0.1
#: Longest statement under a lock that others wait for.
HOLD_SECONDS = 1.0
#: In a transaction that takes such a lock: QueryCanceledError for what takes too long in it.
BOUND_STATEMENTS = f"SET LOCAL statement_timeout = {HOLD_SECONDS * 1000:.0f}"
_TRIES = 20
_PAUSE_SECONDS = (0.05, 0.5)

#: Others hold what we want, or we were in their way.
GAVE_WAY = (
    asyncpg.exceptions.LockNotAvailableError,
    asyncpg.exceptions.TransactionRollbackError,
)


async def patiently[T](call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """What the call returns; after so many tries what it raises, one of GAVE_WAY."""
    for _ in range(_TRIES - 1):
        try:
            return await call(*arguments)
        except GAVE_WAY:
            await asyncio.sleep(uniform(*_PAUSE_SECONDS))  # noqa: S311 - not a secret
    return await call(*arguments)
