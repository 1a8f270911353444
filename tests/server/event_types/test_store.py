"""The cache of event types: at most one second old, without a query per call."""

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
    """Passes queries on and counts them. If `held` is an event, each query waits for it."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.queries = 0
        self.held: asyncio.Event | None = None
        self.read = asyncio.Event()

    async def fetch(self, *arguments: Any) -> Any:
        self.queries += 1
        rows = await self.pool.fetch(*arguments)
        self.read.set()
        if self.held:
            await self.held.wait()
        return rows


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counting(pool: Any) -> CountingPool:
    return CountingPool(pool)


@pytest.fixture
def types(counting: CountingPool, clock: Clock) -> EventTypes:
    return EventTypes(counting, clock)  # type: ignore[arg-type]


async def change(pool: Any, assignment: str) -> None:
    await pool.execute(f"UPDATE event_types SET {assignment} WHERE name = 'payment.succeeded'")  # noqa: S608


async def violation_of(types: EventTypes) -> str | None:
    await types.unknown(["payment.succeeded"])
    return types.payload_violation("payment.succeeded", {"amount": 1})


async def test_event_type_change_applies_after_the_maximum_age(
    pool: Any, types: EventTypes, counting: CountingPool, clock: Clock
) -> None:
    assert await violation_of(types) is None
    queries = counting.queries

    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    clock.now += MAX_AGE_SECONDS * 0.99
    for _ in range(10):
        assert await violation_of(types) is None
    assert counting.queries == queries
    clock.now += MAX_AGE_SECONDS * 0.02
    assert await violation_of(types) == "at $ by the rule #/type"

    await change(pool, """json_schema = '{"required": ["id"]}'""")
    clock.now += MAX_AGE_SECONDS
    assert await violation_of(types) == "at $ by the rule #/required, 'id' is missing"
    await change(pool, "enforce_schema = false")
    clock.now += MAX_AGE_SECONDS
    assert await violation_of(types) is None


async def test_unchanged_schema_is_not_read_again(
    pool: Any, types: EventTypes, counting: CountingPool, clock: Clock
) -> None:
    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    assert await violation_of(types)
    queries = counting.queries
    clock.now += MAX_AGE_SECONDS
    assert await violation_of(types)
    assert counting.queries == queries + 1


async def test_concurrent_lookups_share_one_query(
    types: EventTypes, counting: CountingPool
) -> None:
    await asyncio.gather(*(types.unknown(["payment.succeeded"]) for _ in range(50)))
    assert counting.queries == 1


async def test_invalidation_during_a_read_causes_another_read(
    pool: Any, types: EventTypes, counting: CountingPool
) -> None:
    counting.held = asyncio.Event()
    reading = asyncio.create_task(violation_of(types))
    await counting.read.wait()
    await change(pool, """json_schema = '{"type": "string"}', enforce_schema = true""")
    types.invalidate()
    counting.held.set()
    assert await reading is None
    assert await violation_of(types)


async def test_failed_read_is_repeated(
    types: EventTypes, counting: CountingPool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await violation_of(types)
    clock.now += MAX_AGE_SECONDS

    async def fails(*_: Any) -> Any:
        raise asyncpg.ConnectionDoesNotExistError

    with monkeypatch.context() as patched:
        patched.setattr(counting, "fetch", fails)
        for _ in range(2):
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await violation_of(types)
    assert await violation_of(types) is None


async def test_unusable_schema_is_logged_and_not_enforced(pool: Any, logged: list[Any]) -> None:
    await change(pool, "json_schema = '{', enforce_schema = true")
    assert await violation_of(EventTypes(pool)) is None
    assert [entry["event"] for entry in logged] == ["schema_unusable"]
