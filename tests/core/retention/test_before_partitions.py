"""Rows from before there were daily partitions, and the migration that keeps them."""

import asyncio
from typing import Any

import pytest

from cli.ops.migrate import migrate
from core.errors import ConfigurationError
from core.settings import RetentionSettings
from tests.conftest import database_settings
from tests.support.factories import make_webhook_config
from tests.support.past_rows import past_delivery, past_event, past_pending
from tests.support.retention import assert_sound, ids, partition_of, run_retention

BEFORE_PARTITIONS = "20261123_signatures"


async def test_rows_before_partitions_stay_and_expire(pool: Any, database_url: str) -> None:
    settings = database_settings(database_url)
    await asyncio.to_thread(migrate, settings, down_to=BEFORE_PARTITIONS)
    webhook_id = await make_webhook_config(pool)
    await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    _, pending_event = await past_pending(pool, webhook_id, 40)
    await asyncio.to_thread(migrate, settings)
    await pool.expire_connections()

    assert await partition_of(pool, "finished_deliveries", failed) == "finished_deliveries_before"
    # The previous release writes like this during an upgrade.
    young, young_event = await past_delivery(pool, webhook_id, 1)
    assert await partition_of(pool, "attempts", young, "delivery_id") == "attempts_default"
    await assert_sound(pool)
    assert (await run_retention(database_url)).parts_dropped == []
    assert await ids(pool, "finished_deliveries") == {failed, young}
    assert await ids(pool, "events") == {failed_event, pending_event, young_event}
    await assert_sound(pool)
    strict = RetentionSettings(retention_undelivered_days=30)
    assert (await run_retention(database_url, strict)).parts_dropped == [
        "finished_deliveries_before",
        "attempts_before",
    ]
    assert await ids(pool, "events") == {pending_event, young_event}
    await assert_sound(pool)
    await asyncio.to_thread(migrate, settings, down_to=BEFORE_PARTITIONS)
    await pool.expire_connections()
    assert await ids(pool, "events") == {pending_event, young_event}
    assert await ids(pool, "finished_deliveries") == {young}


async def test_migration_reads_existing_rows_without_lock(pool: Any, database_url: str) -> None:
    settings = database_settings(database_url)
    await asyncio.to_thread(migrate, settings, down_to=BEFORE_PARTITIONS)
    await past_event(pool, 1)
    # Stops the migration after it has read all rows.
    async with pool.acquire() as connection:
        await connection.execute("""
            CREATE FUNCTION stop() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
                IF to_regclass('events_undivided') IS NOT NULL THEN RAISE 'stopped'; END IF;
            END $$;
            CREATE EVENT TRIGGER stop ON ddl_command_end EXECUTE FUNCTION stop();
        """)
        with pytest.raises(ConfigurationError, match="stopped"):
            await asyncio.to_thread(migrate, settings)
        await connection.execute("DROP EVENT TRIGGER stop; DROP FUNCTION stop()")
        constraint = "SELECT convalidated FROM pg_constraint WHERE conname = 'events_unmarked'"
        assert await connection.fetchval(constraint) is True
    # The previous release keeps writing meanwhile.
    await past_event(pool, 0)
    await asyncio.to_thread(migrate, settings)
    await pool.expire_connections()
    assert await pool.fetchval("SELECT count(*) FROM events_before") == 2
