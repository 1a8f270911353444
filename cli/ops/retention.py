"""Runs retention once, or previews a run, for `postrider retention`."""

import asyncio
from collections.abc import Callable

import asyncpg
import orjson

from cli.ops.operator import present_operator
from cli.startup import require_schema
from core import retention
from core.errors import Unavailable
from core.postgres.pool import CONNECTION_ERRORS, open_pool
from core.retention import RunReport
from core.settings import DatabaseSettings, RetentionSettings


def retain_once(
    database: DatabaseSettings,
    settings: RetentionSettings,
    announce: Callable[[str], None],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run or preview, and announce the result. Raises Unavailable if the database is lost."""
    progress = (lambda _: None) if as_json else announce
    try:
        report = asyncio.run(_retain(database, settings, progress, dry_run=dry_run))
    except (*CONNECTION_ERRORS, asyncpg.exceptions.LockNotAvailableError) as error:
        raise Unavailable(
            "the database connection was lost, or another session holds a lock: run "
            f"`postrider retention` again ({type(error).__name__}: {error})",
            reason="DATABASE_UNAVAILABLE",
        ) from error
    if as_json:
        fields = (report or RunReport()).as_dict()
        announce(orjson.dumps({"ran": report is not None, **fields}).decode())
    elif report is None:
        announce("nothing done: another process runs retention right now")
    else:
        announce(_summary(report, dry_run=dry_run))


async def _retain(
    database: DatabaseSettings,
    settings: RetentionSettings,
    announce: Callable[[str], None],
    *,
    dry_run: bool,
) -> RunReport | None:
    async with await open_pool(database, "postrider-retention", 2) as pool:
        await require_schema(pool)
    if dry_run:
        return await retention.preview(database, settings)
    return await retention.run_once(database, settings, present_operator(), announce)


def _summary(report: RunReport, *, dry_run: bool) -> str:
    would = "would be " if dry_run else ""
    dropped = ", ".join(report.days_dropped + report.parts_dropped) or "none"
    removed = (
        f"{report.deliveries_removed:,} deliveries",
        f"{report.events_removed:,} events",
        f"{report.idempotency_keys_removed:,} idempotency keys",
        f"{report.audit_entries_removed:,} audit entries",
    )
    kept = f"{report.deliveries_kept:,} deliveries, {report.events_kept:,} events"
    lines = [
        f"days {would}created: {', '.join(report.days_made) or 'none'}",
        f"partitions {would}dropped: {dropped} ({report.bytes_dropped:,} bytes)",
        f"{would}kept beyond their day: {kept}",
        f"{would}removed one by one: {', '.join(removed)}",
    ]
    if report.days_waiting:
        lines.append(
            f"left for the next run: {', '.join(report.days_waiting)} (still in use, or their rows "
            "are in the default partition; see the log)"
        )
    return "\n".join(lines)
