"""What a process remembers of the event types: nothing older than a second, and no query a call."""

import asyncio
from typing import Any

import asyncpg
import pytest

from server.event_types.store import MAX_AGE_SECONDS, EventTypes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class CountingPool:
    """Passes queries on and counts them; `held` holds the next one up until it is set."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.queries = 0
        self.held: asyncio.Event | None = None
        self.answered = asyncio.Event()

    async def fetch(self, *arguments: Any) -> Any:
        self.queries += 1
        rows = await self.pool.fetch(*arguments)
        self.answered.set()
        if self.held:
            await self.held.wait()
        return rows


async def change(pool: Any, assignment: str) -> None:
    await pool.execute(f"UPDATE event_types SET {assignment} WHERE name = 'payment.succeeded'")  # noqa: S608


async def fault_of(types: EventTypes) -> str | None:
    await types.unknown(["payment.succeeded"])
    return types.payload_violation("payment.succeeded", {"amount": 1})


async def test_event_type_change_applies_after_the_maximum_age(
    pool: Any,
) -> None:
    clock, counting = Clock(), CountingPool(pool)
    types = EventTypes(counting, clock)  # type: ignore[arg-type]
    assert await fault_of(types) is None
    queries = counting.queries

    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    clock.now += MAX_AGE_SECONDS * 0.99
    for _ in range(10):
        assert await fault_of(types) is None
    assert counting.queries == queries
    clock.now += MAX_AGE_SECONDS * 0.02
    assert await fault_of(types) == "at $ by the rule #/type"

    await change(pool, """json_schema = '{"required": ["id"]}'""")
    clock.now += MAX_AGE_SECONDS
    assert await fault_of(types) == "at $ by the rule #/required, 'id' is missing"
    await change(pool, "enforce_schema = false")
    clock.now += MAX_AGE_SECONDS
    assert await fault_of(types) is None


async def test_unchanged_schema_is_not_read_again(pool: Any) -> None:
    clock, counting = Clock(), CountingPool(pool)
    types = EventTypes(counting, clock)  # type: ignore[arg-type]
    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    assert await fault_of(types)
    queries = counting.queries
    clock.now += MAX_AGE_SECONDS
    assert await fault_of(types)
    assert counting.queries == queries + 1


async def test_concurrent_lookups_share_one_query(pool: Any) -> None:
    clock, counting = Clock(), CountingPool(pool)
    types = EventTypes(counting, clock)  # type: ignore[arg-type]
    await asyncio.gather(*(types.unknown(["payment.succeeded"]) for _ in range(50)))
    assert counting.queries == 1


async def test_invalidation_during_a_read_causes_another_read(pool: Any) -> None:
    clock, counting = Clock(), CountingPool(pool)
    types = EventTypes(counting, clock)  # type: ignore[arg-type]
    counting.held = asyncio.Event()
    reading = asyncio.create_task(fault_of(types))
    await counting.answered.wait()
    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    types.invalidate()
    counting.held.set()
    assert await reading is None
    assert await fault_of(types)


async def test_failed_read_is_repeated(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counting = Clock(), CountingPool(pool)
    types = EventTypes(counting, clock)  # type: ignore[arg-type]
    await fault_of(types)
    clock.now += MAX_AGE_SECONDS

    async def fails(*_: Any) -> Any:
        raise asyncpg.ConnectionDoesNotExistError

    with monkeypatch.context() as patched:
        patched.setattr(counting, "fetch", fails)
        for _ in range(2):
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await fault_of(types)
    assert await fault_of(types) is None


async def test_unusable_schema_is_logged_and_not_enforced(pool: Any, logged: list[Any]) -> None:
    await change(pool, "json_schema = '{', enforce_schema = true")
    assert await fault_of(EventTypes(pool)) is None
    assert [entry["event"] for entry in logged] == ["schema_unusable"]
