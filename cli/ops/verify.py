"""Checks the invariants of the database, and reports them, for `postrider verify`."""

import asyncio
from collections.abc import Sequence
from time import monotonic

import orjson

from cli.startup import require_schema
from core import queue
from core.errors import Unavailable
from core.ids import format_id
from core.postgres.pool import CONNECTION_ERRORS, open_pool
from core.queue import Finding
from core.settings import DatabaseSettings

#: Printed ids for each broken invariant.
_EXAMPLES = 10


def verify(settings: DatabaseSettings, budget_seconds: float, *, as_json: bool) -> tuple[str, bool]:
    """Return the report, and whether nothing is broken. Raises Unavailable."""
    began = monotonic()
    findings = asyncio.run(_check(settings, budget_seconds))
    seconds = round(monotonic() - began, 1)
    report = _as_json(findings, seconds) if as_json else _as_table(findings, seconds)
    return report, not any(finding.broken for finding in findings)


async def _check(settings: DatabaseSettings, budget_seconds: float) -> Sequence[Finding]:
    pool = await open_pool(settings, "postrider-verify", size=1)
    try:
        await require_schema(pool)
        return await queue.check_invariants(pool, budget_seconds)
    except CONNECTION_ERRORS as error:
        raise Unavailable(
            "the database connection was lost, or a statement took too long: run `postrider "
            "verify` again "
            f"({type(error).__name__}: {error})",
            reason="DATABASE_UNAVAILABLE",
        ) from error
    finally:
        pool.terminate()


def _as_json(findings: Sequence[Finding], seconds: float) -> str:
    return orjson.dumps(
        {
            "broken": sum(len(finding.broken) for finding in findings),
            "complete": all(finding.complete for finding in findings),
            "seconds": seconds,
            "invariants": [
                {
                    "name": finding.invariant.name,
                    "says": finding.invariant.says,
                    "examined": finding.examined,
                    "broken": len(finding.broken),
                    "examples": _examples(finding),
                    "advice": finding.invariant.advice if finding.broken else None,
                    "complete": finding.complete,
                }
                for finding in findings
            ],
        }
    ).decode()


def _as_table(findings: Sequence[Finding], seconds: float) -> str:
    lines = [f"{'examined':>12} {'broken':>8}  invariant"]
    for finding in findings:
        examined = f"{finding.examined:,}{'' if finding.complete else '+'}"
        lines.append(f"{examined:>12} {len(finding.broken):>8,}  {finding.invariant.says}")
        lines += [f"{'':>23}{example}" for example in _examples(finding)]
        if len(finding.broken) > _EXAMPLES:
            lines.append(f"{'':>23}and {len(finding.broken) - _EXAMPLES:,} more")
        if finding.broken:
            lines.append(f"{'':>23}{finding.invariant.advice}")
    if all(finding.complete for finding in findings):
        lines.append(f"everything was checked, in {seconds} s")
    else:
        lines.append(
            f"the newest rows were checked, in {seconds} s; + marks more rows: raise --seconds"
        )
    return "\n".join(lines)


def _examples(finding: Finding) -> list[str]:
    return [format_id(finding.invariant.ids, id_) for id_ in finding.broken[:_EXAMPLES]]
