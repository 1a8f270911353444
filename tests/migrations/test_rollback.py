"""Migrations down and up again with events and deliveries in the tables."""

import asyncio
from typing import Any

import pytest

from cli.ops.migrate import migrate
from cli.startup import revisions
from core import queue
from tests.conftest import database_settings
from tests.support.doc_pages import section, sh
from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.standby import operators_path

_ACCEPTED = """
SELECT (SELECT array_agg(id ORDER BY id) FROM events) AS events,
    (SELECT array_agg(id ORDER BY id) FROM delivery_queue) AS deliveries,
    (SELECT array_agg(id ORDER BY id) FROM webhook_configs) AS configs
"""


@pytest.mark.parametrize("revision", [revisions()[0], revisions()[-2]])
async def test_downgrade_and_upgrade_keep_accepted_events(
    database_url: str, pool: Any, revision: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await enqueue_events(pool, 5)
    before = dict(await pool.fetchrow(_ACCEPTED))
    assert len(before["deliveries"]) == len(before["events"]) == 5
    assert before["configs"] == [webhook_id]

    settings = database_settings(database_url)
    for target in (revision, None):
        await asyncio.to_thread(migrate, settings, down_to=target)
        await pool.expire_connections()
        assert dict(await pool.fetchrow(_ACCEPTED)) == before

    broken = await queue.check_invariants(pool, 5)
    assert [finding for finding in broken if finding.broken] == []
    assert len(await queue.claim(pool, 10, 60)) == 5


@pytest.mark.slow
async def test_runbook_rolls_a_migration_back(database_url: str, pool: Any) -> None:
    verify, undo = section("docs/operate/runbook.md", "Roll back")
    environment = {
        "PATH": operators_path(),
        "WEBHOOK_DATABASE_URL": database_url,
        "REVISION": revisions()[-2],
    }
    assert "everything was checked" in sh(verify, environment)
    assert f"undid {revisions()[-1]}" in sh(undo, environment)
    revision = await pool.fetchval("SELECT version_num FROM alembic_version")
    assert revision == revisions()[-2]
