"""Runs retention and inspects the rows that it leaves."""

from typing import Any
from uuid import UUID

from core import queue, retention
from core.operator_audit import Operator
from core.settings import RetentionSettings
from tests.conftest import database_settings

SETTINGS = RetentionSettings()


async def run_retention(
    url: str, settings: RetentionSettings = SETTINGS, operator: Operator | None = None
) -> retention.RunReport:
    report = await retention.run_once(database_settings(url), settings, operator)
    assert report is not None
    return report


async def ids(pool: Any, table: str, key: str = "id") -> set[UUID]:
    return {row[0] for row in await pool.fetch(f"SELECT {key} FROM {table}")}  # noqa: S608


async def partition_of(pool: Any, table: str, id_: UUID, key: str = "id") -> str:
    query = f"SELECT tableoid::regclass::text FROM {table} WHERE {key} = $1"  # noqa: S608
    return str(await pool.fetchval(query, id_))


async def assert_sound(pool: Any) -> None:
    """Check the queue's invariants, except those that need a running engine."""
    broken = {
        finding.invariant.name: finding.broken
        for finding in await queue.check_invariants(pool, 10)
        if finding.broken and finding.invariant.name not in ("backlog_let_in", "due_claimed")
    }
    assert broken == {}
