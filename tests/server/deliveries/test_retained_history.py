"""Retention as the API and the command show it."""

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner
from grpc import StatusCode

from cli.main import main
from core import retention
from core.ids import format_id
from core.settings import RetentionSettings
from tests.conftest import database_settings
from tests.support.factories import MERCHANT, make_webhook_config
from tests.support.past_rows import make_days, past_delivery, past_pending
from tests.support.platform import Platform
from tests.support.refused_calls import refused


async def test_removed_history_is_not_found_and_kept_is_redeliverable(
    platform: Platform, pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    gone, gone_event = await past_delivery(pool, webhook_id, 40)
    kept, kept_event = await past_delivery(pool, webhook_id, 40, "failed")
    waiting, waiting_event = await past_pending(pool, webhook_id, 40)
    await retention.run_once(database_settings(database_url), RetentionSettings())

    merchant, producer = platform.as_merchant(MERCHANT), platform.as_producer()
    listed = await merchant.ListDeliveries()
    assert {d.id for d in listed.deliveries} == {format_id("dlv", i) for i in (kept, waiting)}
    events = await producer.ListEvents(merchant_id=MERCHANT)
    shown = {format_id("evt", i) for i in (kept_event, waiting_event)}
    assert {event.id for event in events.events} == shown
    for rpc in (merchant.GetDelivery, merchant.RedeliverDelivery):
        async with refused(StatusCode.NOT_FOUND, "DELIVERY_NOT_FOUND"):
            await rpc(id=format_id("dlv", gone))
    async with refused(StatusCode.NOT_FOUND, "EVENT_NOT_FOUND"):
        await producer.GetEvent(id=format_id("evt", gone_event))
    found = await merchant.GetDelivery(id=format_id("dlv", kept))
    assert len(found.delivery.attempts) == 1
    again = await merchant.RedeliverDelivery(id=format_id("dlv", kept))
    assert again.delivery.event_id == format_id("evt", kept_event)


async def test_engine_runs_retention(platform: Platform, pool: Any) -> None:
    async with platform.engine(retention=RetentionSettings()), asyncio.timeout(20):
        while await retention.last_completed(pool) is None:
            pass
    assert await retention.days_ahead(pool) == 7
    assert await pool.fetchval("SELECT actor FROM retention_runs") == "engine"
    assert await pool.fetchval("SELECT count(*) FROM audit_entries") == 0


async def test_retention_command_previews_then_removes(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    await past_delivery(pool, webhook_id, 40)
    monkeypatch.setenv("WEBHOOK_DATABASE_URL", database_url)

    async def command(*options: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, main, ["retention", *options])
        assert result.exit_code == 0, result.output
        return result.output

    looked = await command("--dry-run")
    assert "partitions would be dropped: " in looked
    assert await pool.fetchval("SELECT count(*) FROM events") == 1
    assert "partitions dropped: finished_deliveries_" in await command()
    assert await pool.fetchval("SELECT count(*) FROM events") == 0
    assert '"days_dropped":[]' in await command("--json")
    rows = await pool.fetch("SELECT actor, action, comment FROM audit_entries ORDER BY id")
    assert [row["action"] for row in rows] == ["RunRetention"] * 2
    assert rows[0]["actor"].startswith("cli:")
    assert '"events_removed":0' in rows[0]["comment"]
