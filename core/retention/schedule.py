"""When retention runs: each engine process asks now and then, and one at a time does it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import orjson
import structlog

from core import queue
from core.ids import new_id
from core.operator_audit import INSERT_OPERATOR_ENTRY, Operator, operator_entry
from core.postgres.connect import Connection, Connector
from core.postgres.pool import CONNECTION_ERRORS, RETRYABLE_ERRORS, Pool
from core.retention import partitions, prune
from core.retention.partitions import GAVE_WAY, HOLD_SECONDS, LOCK_SECONDS, Day, patiently
from core.retention.policy import DeliveryTerms, Terms
from core.settings import DatabaseSettings, RetentionSettings

#: Often enough that what a run could not do is tried again on the same day.
EVERY = timedelta(hours=1)
_ASK_SECONDS = 60.0

log = structlog.get_logger()


async def retain(database: DatabaseSettings, settings: RetentionSettings, pool: Pool) -> None:
    """Run when a run is due, until cancelled. Deliveries go on whatever comes of it."""
    while True:
        try:
            if await _is_due(pool):
                await run(database, settings)
        except RETRYABLE_ERRORS as error:
            log.warning("retention_retried", error=repr(error))
        except asyncpg.exceptions.InsufficientPrivilegeError as error:
            # Whoever migrated owns the tables; see docs/retention.md.
            log.error("retention_not_allowed", error=str(error))
        except Exception:
            log.exception("retention_broke")
        await asyncio.sleep(_ASK_SECONDS)


async def _is_due(pool: Pool) -> bool:
    completed = await last_completed(pool)
    now = await pool.fetchval("SELECT now()")
    return completed is None or now - completed >= EVERY


# One run of retention, from the days ahead to the audit log; one at a time over all processes.
#
# No step needs to know how far an earlier run came: each looks at what is there. So a run may be
# killed anywhere, and the next goes on with what is left.

#: Any constant will do, as long as every process has the same.
_LOCK = 0x72657465
#: So often a day is looked through again because something of it was attempted meanwhile.
_LOOKS = 5
_CLOSE_SECONDS = 2.0
_NOT_NOW = (*GAVE_WAY, asyncpg.exceptions.QueryCanceledError)

_BEGIN = """
INSERT INTO retention_runs (id, actor, removed_before) VALUES ($1, $2, $3)
"""
_COMPLETE = """
UPDATE retention_runs SET completed_at = now(), done = $2::text::jsonb WHERE id = $1
"""
_LAST_COMPLETED = """
SELECT completed_at FROM retention_runs
WHERE completed_at IS NOT NULL ORDER BY completed_at DESC LIMIT 1
"""


@dataclass(slots=True)
class Done:
    """What a run did, or would do: names of partitions, and counts of rows."""

    days_made: list[str] = field(default_factory=list)
    #: Of these tables a day was not made, since rows of it are in the default part, or not dropped,
    #: since others held it or something of it was still being attempted. The next run tries again.
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


async def run(
    database: DatabaseSettings,
    settings: RetentionSettings,
    operator: Operator | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Done | None:
    """Run once; None, and nothing done, while another process does.

    The run of a person is in the audit log; without `operator` it is an engine's.
    """
    async with _session(database) as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            return None
        now: datetime = await connection.fetchval("SELECT now()")
        terms = Terms.at(now, settings)
        run_id = new_id()
        # Before anything is removed: what is looked at beside us may be what is going.
        removed_before = terms.deliveries.delivered_before if terms.deliveries else None
        actor = operator.actor if operator else "engine"
        await connection.execute(_BEGIN, run_id, actor, removed_before)
        done = Done()
        await _make_days(connection, done, announce)
        if terms.deliveries is not None:
            await _remove_deliveries(connection, terms.deliveries, done, announce)
            done.parts_dropped += await prune.drop_emptied(connection)
        if terms.keys_before is not None:
            done.idempotency_keys_removed = await prune.remove_keys(connection, terms.keys_before)
        if terms.audit_before is not None:
            done.audit_entries_removed = await prune.remove_audit_entries(
                connection, terms.audit_before
            )
        await prune.remove_runs(connection, now)
        report = orjson.dumps(done.as_dict()).decode()
        async with connection.transaction():
            await connection.execute(_COMPLETE, run_id, report)
            if operator is not None:
                entry = operator_entry(
                    operator, action="RunRetention", resource="retention", comment=report
                )
                await connection.execute(INSERT_OPERATOR_ENTRY, *entry)
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    log.info("retention_ran", **done.as_dict())
    return done


async def look(database: DatabaseSettings, settings: RetentionSettings) -> Done:
    """What a run would do now; reads only. Of events it tells the partitions, not the rows."""
    async with _session(database) as connection:
        terms = Terms.at(await connection.fetchval("SELECT now()"), settings)
        done = Done(days_made=[str(day.date) for day in await partitions.missing_days(connection)])
        if terms.deliveries is not None:
            await _look_at_deliveries(connection, terms.deliveries, done)
        if terms.keys_before is not None:
            done.idempotency_keys_removed = await prune.count_keys(connection, terms.keys_before)
        if terms.audit_before is not None:
            done.audit_entries_removed = await prune.count_audit_entries(
                connection, terms.audit_before
            )
        return done


async def _look_at_deliveries(connection: Connection, terms: DeliveryTerms, done: Done) -> None:
    for part in await partitions.parts(connection):
        if part.day.end > terms.delivered_before:
            continue
        done.days_dropped.append(part.day.part(part.table))
        done.bytes_dropped += part.bytes
        if part.table == "finished_deliveries":
            done.deliveries_kept += await prune.keep_history(connection, part.day, terms, dry=True)
    done.deliveries_removed = await prune.remove_finished(connection, terms, dry=True)


async def last_completed(connection: Pool) -> datetime | None:
    """When a run last completed; None: never.

    For the metric postrider_retention_last_run_timestamp_seconds.
    """
    moment: datetime | None = await connection.fetchval(_LAST_COMPLETED)
    return moment


async def _make_days(connection: Connection, done: Done, announce: Callable[[str], None]) -> None:
    for day in await partitions.missing_days(connection):
        try:
            made = await patiently(partitions.make_day, connection, day)
        except _NOT_NOW:
            made = False
        if made:
            done.days_made.append(str(day.date))
            announce(f"{day.date}: made")
        else:
            done.days_waiting.append(str(day.date))
            log.warning("retention_day_not_made", day=str(day.date))


async def _remove_deliveries(
    connection: Connection, terms: DeliveryTerms, done: Done, announce: Callable[[str], None]
) -> None:
    """Deliveries first: an event is needed by those that are left, open or finished.

    The order is the proof: a redelivery is made of a finished delivery. Made before that one went,
    it is in the queue when we look there. Made later, of another one, that one is found when we
    look at the finished, which is last and before any other of them can go.
    """
    for day in await _due(connection, partitions.HISTORY, terms):
        if not await _drop_history(connection, day, terms, done, announce):
            _wait(done, day)
    done.deliveries_removed = await prune.remove_finished(connection, terms)
    await prune.note_open_events(connection, terms)
    for day in await _due(connection, partitions.EVENTS, terms):
        done.events_kept += await prune.keep_events(connection, day)
        try:
            await patiently(_drop, connection, partitions.EVENTS, day, done)
        except _NOT_NOW:
            _wait(done, day)
        else:
            announce(f"{day.date}: events dropped")
    done.events_removed = await prune.remove_events(connection, terms)


def _wait(done: Done, day: Day) -> None:
    done.days_waiting.append(str(day.date))
    log.warning("retention_day_waits", day=str(day.date))


async def _drop_history(
    connection: Connection,
    day: Day,
    terms: DeliveryTerms,
    done: Done,
    announce: Callable[[str], None],
) -> bool:
    """Whether the day is gone: not while what is open of it is being attempted again and again."""
    for _ in range(_LOOKS):
        standing = await queue.standing(connection, day.low, day.high)
        done.deliveries_kept += await prune.keep_history(connection, day, terms)
        try:
            if await patiently(_drop, connection, partitions.HISTORY, day, done, standing):
                announce(f"{day.date}: history dropped")
                return True
        except _NOT_NOW:
            return False
    return False


async def _drop(
    connection: Connection,
    tables: tuple[str, ...],
    day: Day,
    done: Done,
    standing: tuple[int, int] | None = None,
) -> bool:
    """Drop a day's parts, unless it stands otherwise than when it was looked through."""
    bytes_there = sum(p.bytes for p in await partitions.parts(connection, tables) if p.day == day)
    # Each statement has to see what was committed before it, whatever the database's default is.
    async with connection.transaction(isolation="read_committed"):
        await partitions.lock_days(connection, tables)
        now_standing = await queue.standing(connection, day.low, day.high) if standing else None
        if now_standing != standing:
            return False
        await partitions.drop_parts(connection, tables, day)
    done.days_dropped += [day.part(table) for table in tables]
    done.bytes_dropped += bytes_there
    return True


async def _due(connection: Connection, tables: tuple[str, ...], terms: DeliveryTerms) -> list[Day]:
    """The days of these tables that are over for what was delivered, the oldest first."""
    found = {part.day for part in await partitions.parts(connection, tables)}
    return sorted(
        (day for day in found if day.end <= terms.delivered_before), key=lambda day: day.date
    )


@asynccontextmanager
async def _session(database: DatabaseSettings) -> AsyncGenerator[Connection]:
    """A connection of its own, whose end gives the lock back, however it comes."""
    connection = await Connector(database, "postrider-retention").connect()
    # A process that is frozen between two statements lets go of its locks as well.
    await connection.execute(
        f"SET lock_timeout = {LOCK_SECONDS * 1000:.0f};"
        f"SET idle_in_transaction_session_timeout = {HOLD_SECONDS * 1000:.0f}"
    )
    try:
        yield connection
    finally:
        with suppress(*CONNECTION_ERRORS):
            await connection.close(timeout=_CLOSE_SECONDS)
