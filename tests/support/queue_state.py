"""The states of deliveries and breakers in the database, read and awaited."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from core.ids import parse_id

_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.01


async def queue_states(pool: Any) -> Counter[str]:
    """Return the number of open deliveries by state."""
    rows = await pool.fetch("SELECT state FROM delivery_queue")
    return Counter(row["state"] for row in rows)


async def finished_states(pool: Any) -> Counter[str]:
    """Return the number of finished deliveries by state."""
    rows = await pool.fetch("SELECT state FROM finished_deliveries")
    return Counter(row["state"] for row in rows)


async def attempt_outcomes(pool: Any) -> Counter[str]:
    """Return the number of recorded attempts by outcome."""
    return Counter(row["outcome"] for row in await pool.fetch("SELECT outcome FROM attempts"))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once a condition on the database holds."""
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        while not await condition():  # noqa: ASYNC110 - the database sends no event for it
            await asyncio.sleep(_POLL_SECONDS)


async def until_queued(pool: Any, expected: Mapping[str, int]) -> None:
    """Return once the open deliveries are in exactly these states."""

    async def as_expected() -> bool:
        return await queue_states(pool) == expected

    await until(as_expected)


async def until_finished(pool: Any, count: int) -> Counter[str]:
    """Wait until this many deliveries are finished and none is pending. Returns all states."""

    async def is_finished() -> bool:
        return (await finished_states(pool)).total() == count and not await queue_states(pool)

    await until(is_finished)
    return await finished_states(pool)


async def breaker_state(pool: Any, webhook_id: str) -> str:
    """Return `closed`, `open` or `half-open`."""
    state: str = await pool.fetchval(
        "SELECT CASE WHEN breaker_open_until IS NULL THEN 'closed'"
        " WHEN breaker_open_until > now() THEN 'open' ELSE 'half-open' END"
        " FROM webhook_configs WHERE id = $1",
        parse_id("wh", webhook_id),
    )
    return state


async def open_breaker(pool: Any, webhook_id: str, seconds: float) -> None:
    """Open a config's breaker. It is half-open after 0 seconds."""
    await pool.execute(
        "UPDATE webhook_configs SET breaker_open_until = now() + $2 * interval '1 second',"
        " breaker_trips = 1 WHERE id = $1",
        parse_id("wh", webhook_id),
        seconds,
    )
