"""Daily partitions: creation ahead of time, and rows without one."""

from typing import Any

import pytest

from core import queue, retention
from core.retention import partitions, prune
from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.past_rows import day_of, make_days, past_delivery
from tests.support.retention import assert_sound, partition_of, run_retention


async def test_days_are_created_ahead_and_used(pool: Any, database_url: str) -> None:
    assert await retention.days_ahead(pool) == -1

    report = await run_retention(database_url)

    assert report.days_made == [str(day_of(-number).date) for number in range(8)]
    assert await retention.days_ahead(pool) == 7
    webhook_id = await make_webhook_config(pool)
    [event] = await enqueue_events(pool)
    assert await partition_of(pool, "events", event.id) == day_of(0).partition("events")
    [delivery] = await queue.claim(pool, 1, 60)
    assert delivery.webhook_id == webhook_id
    assert (await run_retention(database_url)).days_made == []


async def test_days_ahead_stop_at_a_gap_in_any_table(pool: Any, database_url: str) -> None:
    await run_retention(database_url)

    await pool.execute(f"DROP TABLE {day_of(-3).partition('attempts')}")

    assert await retention.days_ahead(pool) == 2


async def test_day_with_rows_in_default_is_not_created(pool: Any, database_url: str) -> None:
    await make_webhook_config(pool)
    [event] = await enqueue_events(pool)
    assert await partition_of(pool, "events", event.id) == "events_default"

    report = await run_retention(database_url)

    assert (report.days_waiting, len(report.days_made)) == ([str(day_of(0).date)], 7)
    assert await retention.days_ahead(pool) == -1
    [later] = await enqueue_events(pool)
    assert await partition_of(pool, "events", later.id) == "events_default"
    await assert_sound(pool)


async def test_day_is_created_in_one_message(pool: Any) -> None:
    """A client that freezes then holds no lock."""
    sent: list[str] = []
    async with pool.acquire() as connection:
        connection.add_query_logger(lambda query: sent.append(query.query))
        assert await partitions.create_day(connection, day_of(40))

    [change] = [query for query in sent if "TABLE" in query]
    assert change.count("ATTACH PARTITION") == 3
    assert not any("BEGIN" in query for query in sent)


async def test_day_locked_by_another_session_is_deferred(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_retention(database_url)
    monkeypatch.setattr(partitions, "_TRIES", 1)
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    await past_delivery(pool, webhook_id, 40)
    # pg_dump locks tables like this for its whole run.
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE events, finished_deliveries IN ACCESS SHARE MODE")
        report = await run_retention(database_url)
        assert report.days_waiting == [str(day_of(40).date)] * 2
        assert await pool.fetchval("SELECT count(*) FROM events") == 1
        await assert_sound(pool)

    assert len((await run_retention(database_url)).days_dropped) == 3


async def test_slow_change_under_lock_is_cancelled_and_deferred(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    await past_delivery(pool, webhook_id, 40)
    await pool.execute("""
        CREATE FUNCTION delay() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_sleep(10);
        END $$;
        CREATE EVENT TRIGGER delay ON ddl_command_start WHEN TAG IN ('ALTER TABLE', 'DROP TABLE')
            EXECUTE FUNCTION delay();
    """)
    monkeypatch.setattr(partitions, "LIMIT_STATEMENTS", "SET LOCAL statement_timeout = 50")
    monkeypatch.setattr(partitions, "DAYS_AHEAD", 1)
    without_drop = prune._CREATE_OPEN_EVENTS.replace("DROP TABLE IF EXISTS", "--")
    monkeypatch.setattr(prune, "_CREATE_OPEN_EVENTS", without_drop)

    report = await run_retention(database_url)

    not_created = [str(day_of(number).date) for number in (0, -1)]
    assert report.days_waiting == [*not_created, *[str(day_of(40).date)] * 2]
    await assert_sound(pool)
