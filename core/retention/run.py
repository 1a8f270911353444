"""One run of retention, from the days ahead to the audit log. Only one process runs at a time.

Each step works on the rows and partitions that it finds. A run can therefore be killed at any point
and the next one continues.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import asyncpg
import orjson
import structlog

from core import queue
from core.ids import new_id
from core.operator_audit import INSERT_OPERATOR_ENTRY, Operator, operator_entry
from core.postgres.connect import Connector
from core.postgres.pool import CONNECTION_ERRORS
from core.postgres.protocols import Connection, Pool
from core.retention import move, partitions, prune
from core.retention.partitions import (
    EVENT_TABLES,
    HISTORY_TABLES,
    LOCK_CONFLICTS,
    LOCK_SECONDS,
    LOCKED_STATEMENT_SECONDS,
    Day,
    retry_lock_conflicts,
)
from core.retention.policy import NO_LIMIT, RetentionPolicy
from core.settings import DatabaseSettings, RetentionSettings

#: Advisory lock of a run, the same in all processes and releases.
_RUN_LOCK = 0x72657465
#: Tries to drop a day while its open deliveries are attempted.
_DROP_TRIES = 5
_CLOSE_SECONDS = 2.0
_DEFERRED_ERRORS = (*LOCK_CONFLICTS, asyncpg.exceptions.QueryCanceledError)

_INSERT_RUN = """
INSERT INTO retention_runs (id, actor, removed_before) VALUES ($1, $2, $3)
"""
_COMPLETE_RUN = """
UPDATE retention_runs SET completed_at = now(), done = $2::text::jsonb WHERE id = $1
"""
_LAST_COMPLETED = """
SELECT completed_at FROM retention_runs
WHERE completed_at IS NOT NULL ORDER BY completed_at DESC LIMIT 1
"""

log = structlog.get_logger()


@dataclass(slots=True)
class RunReport:
    """The changes of a run: names of partitions and counts of rows."""

    days_made: list[str] = field(default_factory=list)
    #: Days left to the next run: their rows are in the default partition, their partition is locked
    #: by others, or their deliveries are still attempted.
    days_waiting: list[str] = field(default_factory=list)
    days_dropped: list[str] = field(default_factory=list)
    bytes_dropped: int = 0
    deliveries_kept: int = 0
    events_kept: int = 0
    deliveries_removed: int = 0
    events_removed: int = 0
    idempotency_keys_removed: int = 0
    audit_entries_removed: int = 0
    parts_dropped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def defer(self, day: Day, event: str) -> None:
        self.days_waiting.append(str(day.date))
        log.warning(event, day=str(day.date))


async def run_once(
    database: DatabaseSettings,
    settings: RetentionSettings,
    operator: Operator | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> RunReport | None:
    """Run retention. Returns None without a change if another process is running it.

    A run of an operator is written to the audit log. Runs of engines have no operator.
    """
    async with _open_session(database) as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _RUN_LOCK):
            return None
        now: datetime = await connection.fetchval("SELECT now()")
        policy = RetentionPolicy.at(now, settings)
        run_id = new_id()
        # Recorded before rows are removed, because readers compare against it.
        limited = policy.delivered_before > NO_LIMIT
        removed_before = policy.delivered_before if limited else None
        actor = operator.actor if operator else "engine"
        await connection.execute(_INSERT_RUN, run_id, actor, removed_before)
        report = RunReport()
        await _create_days(connection, report, announce)
        if limited:
            await _remove_deliveries(connection, policy, report, announce)
            report.parts_dropped += await prune.drop_empty_before_partitions(connection)
        keys = await prune.remove_keys(connection, policy.keys_before)
        report.idempotency_keys_removed = keys
        entries = await prune.remove_audit_entries(connection, policy.audit_before)
        report.audit_entries_removed = entries
        await prune.remove_runs(connection, now)
        done = orjson.dumps(report.as_dict()).decode()
        async with connection.transaction():
            await connection.execute(_COMPLETE_RUN, run_id, done)
            if operator is not None:
                entry = operator_entry(
                    operator, action="RunRetention", resource="retention", comment=done
                )
                await connection.execute(INSERT_OPERATOR_ENTRY, *entry)
        await connection.execute("SELECT pg_advisory_unlock($1)", _RUN_LOCK)
    log.info("retention_ran", **report.as_dict())
    return report


async def preview(database: DatabaseSettings, settings: RetentionSettings) -> RunReport:
    """Return the changes of a run without making them. Counts no events, only their partitions."""
    async with _open_session(database) as connection:
        policy = RetentionPolicy.at(await connection.fetchval("SELECT now()"), settings)
        today = await partitions.today(connection)
        missing = await partitions.missing_days(connection, today)
        report = RunReport(
            days_made=[str(day.date) for day in missing],
            deliveries_removed=await prune.remove_finished(connection, policy, dry_run=True),
            idempotency_keys_removed=await prune.count_keys(connection, policy.keys_before),
            audit_entries_removed=await prune.count_audit_entries(connection, policy.audit_before),
        )
        for partition in await partitions.list_partitions(connection):
            day, table = partition.day, partition.table
            if day.end > policy.delivered_before:
                continue
            report.days_dropped.append(day.partition(table))
            report.bytes_dropped += partition.bytes
            if table == "finished_deliveries":
                moved = await move.move_history(connection, day, policy, dry_run=True)
                report.deliveries_kept += moved
        return report


async def last_completed(connection: Pool) -> datetime | None:
    """Return when a run last completed, for postrider_retention_last_run_timestamp_seconds."""
    moment: datetime | None = await connection.fetchval(_LAST_COMPLETED)
    return moment


async def _create_days(
    connection: Connection, report: RunReport, announce: Callable[[str], None]
) -> None:
    today = await partitions.today(connection)
    for day in await partitions.missing_days(connection, today):
        try:
            created = await retry_lock_conflicts(partitions.create_day, connection, day)
        except _DEFERRED_ERRORS:
            created = False
        if created:
            report.days_made.append(str(day.date))
            announce(f"{day.date}: made")
        else:
            report.defer(day, "retention_day_not_made")


async def _remove_deliveries(
    connection: Connection,
    policy: RetentionPolicy,
    report: RunReport,
    announce: Callable[[str], None],
) -> None:
    """Remove deliveries before events, because an event is needed while it has a delivery.

    This order is safe without locks. A redelivery needs its finished delivery. If it is created
    before that delivery is removed, `collect_open_events` finds it. If later, its finished delivery
    is one that stays, and the search for needed events finds that one.
    """
    for day in await _expired_days(connection, HISTORY_TABLES, policy):
        if await _drop_history(connection, day, policy, report):
            announce(f"{day.date}: history dropped")
        else:
            report.defer(day, "retention_day_waits")
    report.deliveries_removed = await prune.remove_finished(connection, policy)
    await prune.collect_open_events(connection, policy)
    for day in await _expired_days(connection, EVENT_TABLES, policy):
        report.events_kept += await move.move_events(connection, day)
        try:
            await retry_lock_conflicts(_drop, connection, EVENT_TABLES, day, report)
        except _DEFERRED_ERRORS:
            report.defer(day, "retention_day_waits")
        else:
            announce(f"{day.date}: events dropped")
    report.events_removed = await prune.remove_events(connection, policy)


async def _drop_history(
    connection: Connection, day: Day, policy: RetentionPolicy, report: RunReport
) -> bool:
    """Drop the day's history. Returns False if its deliveries are attempted again and again."""
    for _ in range(_DROP_TRIES):
        open_before = await queue.count_open(connection, day.low, day.high)
        report.deliveries_kept += await move.move_history(connection, day, policy)
        try:
            if await retry_lock_conflicts(
                _drop, connection, HISTORY_TABLES, day, report, open_before
            ):
                return True
        except _DEFERRED_ERRORS:
            return False
    return False


async def _drop(
    connection: Connection,
    tables: tuple[str, ...],
    day: Day,
    report: RunReport,
    open_before: tuple[int, int] | None = None,
) -> bool:
    """Drop the day's partitions, unless open deliveries of the day changed since `open_before`."""
    existing = await partitions.list_partitions(connection, tables)
    # Overrides the default isolation, because each statement must see the latest commits.
    async with connection.transaction(isolation="read_committed"):
        await partitions.lock_daily_partitions(connection, tables)
        if open_before and await queue.count_open(connection, day.low, day.high) != open_before:
            return False
        await partitions.drop_day(connection, tables, day)
    report.days_dropped += [day.partition(table) for table in tables]
    report.bytes_dropped += sum(p.bytes for p in existing if p.day == day)
    return True


async def _expired_days(
    connection: Connection, tables: tuple[str, ...], policy: RetentionPolicy
) -> list[Day]:
    """Return the days whose delivered deliveries are all old, the oldest first."""
    found = {partition.day for partition in await partitions.list_partitions(connection, tables)}
    expired = (day for day in found if day.end <= policy.delivered_before)
    return sorted(expired, key=lambda day: day.date)


@asynccontextmanager
async def _open_session(database: DatabaseSettings) -> AsyncGenerator[Connection]:
    """Open a separate connection. Its end releases the advisory lock in any case."""
    connection = await Connector(database, "postrider-retention").connect()
    # The second timeout releases the locks of a process that freezes between two statements.
    await connection.execute(
        f"SET lock_timeout = {LOCK_SECONDS * 1000:.0f};"
        "SET idle_in_transaction_session_timeout = "
        f"{LOCKED_STATEMENT_SECONDS * 1000:.0f}"
    )
    try:
        yield connection
    finally:
        with suppress(*CONNECTION_ERRORS):
            await connection.close(timeout=_CLOSE_SECONDS)
