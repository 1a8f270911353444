"""The stats of the database, also if it is unavailable."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from cli.dev.postgres import EmbeddedPostgres
from core import retention
from core.ids import new_id
from core.lifecycle import DeliveryState
from core.postgres.pool import open_pool
from core.queue import read_queue_stats, stats
from core.settings import RetentionSettings
from delivery import database_stats
from delivery.database_stats import DatabaseStats
from tests.conftest import database_settings
from tests.support.factories import make_delivery, make_webhook_config

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture
async def engine_pool(database_url: str) -> AsyncIterator[Any]:
    async with await open_pool(database_settings(database_url), "test", 2) as pool:
        yield pool


async def test_stats_count_open_deliveries_by_state(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for state, count in (("ready", 1), ("parked", 2), ("leased", 3)):
        for _ in range(count):
            await make_delivery(pool, webhook_id, state=state)
    await make_delivery(pool, webhook_id, ordering_key="key", ordering_position=0)
    for position in (1, 2, 3):
        await _make_blocked(pool, webhook_id, position)

    async with pool.acquire() as connection:
        found = await read_queue_stats(connection)

    assert found.deliveries == {
        DeliveryState.READY: 2,
        DeliveryState.PARKED: 2,
        DeliveryState.LEASED: 3,
        DeliveryState.BLOCKED: 3,
    }


async def test_stats_estimate_large_queues_from_index(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "COUNTED_MAX", 10)
    webhook_id = await make_webhook_config(pool)
    async with pool.acquire() as connection:
        await _park_many(pool, webhook_id, 1000)
        # Nothing is known of the index yet.
        assert (await read_queue_stats(connection)).deliveries[DeliveryState.PARKED] >= 10
        await pool.execute("VACUUM ANALYZE delivery_queue")
        assert (await read_queue_stats(connection)).deliveries[DeliveryState.PARKED] == 1000
        await _park_many(pool, webhook_id, 1000)
        grown = (await read_queue_stats(connection)).deliveries[DeliveryState.PARKED]

    assert 1500 <= grown <= 2500


async def test_stats_plan_reads_state_index_with_stale_statistics(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    await pool.execute("VACUUM ANALYZE delivery_queue")
    async with pool.acquire() as connection, connection.transaction():
        await _park_many(connection, webhook_id, 5000)
        await connection.execute("SET LOCAL enable_seqscan = off")
        await connection.execute(stats._IN_INDEX_ORDER)
        rows = await connection.fetch(f"EXPLAIN {stats._DELIVERIES}", 100)

    plan = "\n".join(row[0] for row in rows)
    assert "delivery_queue_parked" in plan
    assert "Sort" not in plan
    assert "Bitmap" not in plan


@pytest.mark.parametrize(
    ("state", "times", "age"),
    [
        ("ready", {"due_in": -30.0}, 30),
        ("ready", {"due_in": 30.0}, 0),
        ("leased", {"due_in": -90.0, "lease_in": -20.0}, 20),
        ("leased", {"due_in": -90.0, "lease_in": 20.0}, 0),
        ("parked", {"due_in": -90.0}, 0),
    ],
)
async def test_oldest_due_counts_only_claimable_deliveries(
    pool: Any, state: str, times: dict[str, float], age: float
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_delivery(pool, webhook_id, state=state, **times)

    async with pool.acquire() as connection:
        found = (await read_queue_stats(connection)).oldest_due_age_seconds

    assert age <= found <= age + 5 if age else found == 0


async def test_stats_count_breakers_of_configs_with_backlog(pool: Any) -> None:
    now = await pool.fetchval("SELECT now()")
    later, earlier = now + timedelta(minutes=5), now - timedelta(minutes=5)
    for open_until, parked in ((later, 2), (later, 1), (earlier, 1), (None, 1), (later, 0)):
        webhook_id = await make_webhook_config(pool, breaker_open_until=open_until)
        for _ in range(parked):
            await make_delivery(pool, webhook_id, state="parked")

    async with pool.acquire() as connection:
        found = await read_queue_stats(connection)

    assert (found.open_breakers, found.half_open_breakers) == (2, 1)


async def test_stats_count_configs_by_status(pool: Any, engine_pool: Any) -> None:
    for _ in range(2):
        await make_webhook_config(pool)
    for reason in ("paused", "failures", "failures", "admin", "gone"):
        await make_webhook_config(pool, active=False, deactivation_reason=reason)
    await make_webhook_config(pool, deleted_at=NOW)
    await make_webhook_config(pool, active=False, deleted_at=NOW)

    reading = await DatabaseStats(engine_pool).reading()

    assert reading.configs == {"active": 2, "paused": 1, "failures": 2, "admin": 1, "gone": 1}
    assert reading.database_up
    assert reading.clock_skew_seconds is not None
    assert abs(reading.clock_skew_seconds) < 5


async def test_reading_is_cached_for_five_seconds(engine_pool: Any) -> None:
    now = 0.0
    taking = DatabaseStats(engine_pool, lambda: now)
    await asyncio.gather(*(taking.reading() for _ in range(10)))
    sent = engine_pool.statements

    now = 4.9
    await taking.reading()
    assert engine_pool.statements == sent
    now = 5.0
    await taking.reading()
    assert engine_pool.statements == 2 * sent


async def test_reading_without_database_reports_it_down(
    postgres: EmbeddedPostgres, engine_pool: Any, logged: list[Any]
) -> None:
    name = await engine_pool.fetchval("SELECT current_database()")
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
    )
    await admin.close()

    reading = await DatabaseStats(engine_pool).reading()

    assert reading == database_stats.Reading(database_up=False)
    assert [entry["event"] for entry in logged] == ["census_failed"]


async def test_slow_stats_are_left_out_of_the_reading(
    pool: Any, engine_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_stats, "WAIT_SECONDS", 0.3)
    now = 0.0
    taking = DatabaseStats(engine_pool, lambda: now)
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE delivery_queue IN ACCESS EXCLUSIVE MODE")
        reading = await taking.reading()
        assert (reading.database_up, reading.queue) == (True, None)
        # The same look goes on, and there is not a second one.
        assert (await taking.reading()) == reading
        assert await _sessions_waiting(pool) == 1

    monkeypatch.setattr(database_stats, "WAIT_SECONDS", 10.0)
    assert (await taking.reading()).queue is not None
    await taking.close()


async def _sessions_waiting(pool: Any) -> int:
    count: int = await pool.fetchval(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return count


async def test_reading_reports_retention_after_its_run(database_url: str, engine_pool: Any) -> None:
    now = 0.0
    taking = DatabaseStats(engine_pool, lambda: now)
    before = await taking.reading()
    await retention.run_once(database_settings(database_url), RetentionSettings())
    now += database_stats.FRESH_SECONDS
    after = await taking.reading()

    assert (before.partition_days_ahead, before.retention_completed_at) == (-1, None)
    assert after.partition_days_ahead is not None
    assert after.partition_days_ahead >= 1
    assert after.retention_completed_at is not None


async def _make_blocked(pool: Any, webhook_id: Any, position: int) -> None:
    await pool.execute(
        "INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state,"
        " due_at, ordering_key, ordering_position)"
        " VALUES ($1, $2, $1, 'm_1', 't', 'blocked', 'infinity', 'key', $3)",
        new_id(),
        webhook_id,
        position,
    )


async def _park_many(pool: Any, webhook_id: Any, count: int) -> None:
    await pool.execute(
        "INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state)"
        " SELECT new_uuid7(), $1, new_uuid7(), 'm_1', 't', 'parked' FROM generate_series(1, $2)",
        webhook_id,
        count,
    )
