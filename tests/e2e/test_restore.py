"""Restoring a dump by the lines of docs/operate/runbook.md, and its effect on deliveries."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from cli.dev.postgres import EmbeddedPostgres
from tests.support.doc_pages import section, sh
from tests.support.platform import Platform, running_platform
from tests.support.receiver import Receiver
from tests.support.standby import operators_path

pytestmark = pytest.mark.slow


@pytest.fixture
async def restored_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The URL of an empty database."""
    connection = await asyncpg.connect(postgres.url())
    await connection.execute("CREATE DATABASE restored TEMPLATE template0")
    yield postgres.url("restored")
    await connection.execute("DROP DATABASE restored WITH (FORCE)")
    await connection.close()


async def test_restored_dump_continues_deliveries(
    platform: Platform,
    receiver: Receiver,
    restored_url: str,
    tmp_path: Path,
) -> None:
    dumped = platform.settings.database.database_url
    assert dumped is not None
    ca_file = platform.settings.egress.ca_file
    assert ca_file is not None
    await platform.register(receiver.url)
    before = await platform.publish(idempotency_key="before")
    take, restore, look = section("docs/operate/runbook.md", "Restore a backup")
    environment = {
        "PATH": operators_path(),
        "WEBHOOK_DATABASE_URL": dumped.get_secret_value(),
        "DUMP": str(tmp_path / "postrider.dump"),
        "RESTORED": restored_url,
    }
    sh(take, environment)
    after = await platform.publish(idempotency_key="after")
    async with platform.engine():
        await receiver.wait_for(2)

    sh(restore, environment)
    assert "everything was checked" in sh(look, environment)
    async with running_platform(restored_url, ca_file, tmp_path) as again:
        known = await again.publish(idempotency_key="before")
        assert (known.duplicate, known.event.id) == (True, before.event.id)
        anew = await again.publish(idempotency_key="after")
        assert not anew.duplicate
        async with again.engine():
            webhooks = await receiver.wait_for(4)
    sent = [webhook.message_id for webhook in webhooks]
    assert sorted(sent[:2]) == sorted([before.event.id, after.event.id])
    assert sorted(sent[2:]) == sorted([before.event.id, anew.event.id])
