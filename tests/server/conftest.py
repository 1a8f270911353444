"""A server on a PostgreSQL that the test may stop and freeze."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.platform import Platform, running_platform
from tests.support.restartable_postgres import RestartablePostgres


@pytest.fixture
async def on_own(
    restartable_postgres: RestartablePostgres,
    ca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Platform]:
    """A platform on `restartable_postgres`, with shorter timeouts than in production."""
    assert restartable_postgres.server is not None
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("WEBHOOK_DATABASE_CONNECT_TIMEOUT_SECONDS", "0.5")
    async with running_platform(
        restartable_postgres.server.url(), ca_file, tmp_path, health_interval_seconds=0.05
    ) as platform:
        yield platform
