"""Runs EXPLAIN ANALYZE and checks the plan of a statement.

EXPLAIN of a statement with arguments always uses a custom plan. To get the generic plan too, the
module explains the EXECUTE of a prepared statement.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PLAN_MODES = ("force_custom_plan", "force_generic_plan")

_numbers = itertools.count()


async def planned_by(connection: Any, mode: str, statement: str, arguments: Sequence[Any]) -> str:
    """Prepare the statement with a plan cache mode. Returns its EXECUTE with these arguments."""
    name = f"planned_{next(_numbers)}"
    await connection.execute(f"SET plan_cache_mode = {mode}")
    await connection.execute(f"PREPARE {name} AS {statement}")
    return await execution(connection, name, statement, arguments)


async def execution(connection: Any, name: str, statement: str, arguments: Sequence[Any]) -> str:
    """An EXECUTE of a prepared statement with these arguments."""
    types = (await connection.prepare(statement)).get_parameters()
    values = [
        str(await connection.fetchval(f"SELECT quote_nullable(($1::{kind.name})::text)", value))
        for kind, value in zip(types, arguments, strict=True)
    ]
    return f"EXECUTE {name}({', '.join(values)})" if values else f"EXECUTE {name}"


@dataclass(frozen=True, slots=True)
class Scan:
    """A plan node that reads a table or an index. Counts cover all its loops."""

    kind: str
    relation: str
    index: str | None
    rows: float
    filtered: float
    pages: int
    entered: bool


@dataclass(frozen=True, slots=True)
class Plan:
    scans: list[Scan]
    pages: int
    kinds: set[str]
    #: PostgreSQL before 18 rounds the rows per loop, so half a row is reported as 0.
    whole_rows: bool

    def index_scan(self, index: str) -> Scan:
        """The scan of this index, with `_day_` in place of the date. Fails if there is none."""
        found = [scan for scan in self.scans if scan.index == index]
        assert found, f"{index} is not used, but {[(s.kind, s.relation) for s in self.scans]}"
        # Only one of several partitions has matching rows.
        return max(found, key=lambda scan: scan.rows + scan.filtered)

    def days_entered(self, table: str) -> int:
        """The number of partitions of a table that were executed."""
        return sum(s.entered for s in self.scans if re.fullmatch(rf"{table}_\d{{8}}", s.relation))

    def halved(self, rows: int) -> int:
        """The reported count if every second loop returned a row."""
        return 0 if self.whole_rows else rows


async def explain(connection: Any, statement: str, *arguments: Any) -> Plan:
    """Run a statement in a transaction that is rolled back, and return its plan.

    Fails if a growing table is read without an index. A sequential scan of the webhook configs is
    allowed, because it is the better plan for a batch on a few thousand rows.
    """
    transaction = connection.transaction()
    await transaction.start()
    try:
        text = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}", *arguments
        )
    finally:
        await transaction.rollback()
    root = json.loads(text)[0]["Plan"]
    scans = [
        Scan(
            kind=node["Node Type"],
            relation=node.get("Relation Name", ""),
            index=re.sub(r"_\d{8}_", "_day_", node.get("Index Name", "")) or None,
            rows=round(node["Actual Rows"] * node["Actual Loops"]),
            filtered=round(node.get("Rows Removed by Filter", 0) * node["Actual Loops"]),
            pages=_pages(node),
            entered=node["Actual Loops"] > 0,
        )
        for node in _nodes(root)
        if "Scan" in node["Node Type"] and ("Relation Name" in node or "Index Name" in node)
    ]
    walked = {scan.relation for scan in scans if scan.kind == "Seq Scan"}
    assert walked <= {"webhook_configs"}
    return Plan(
        scans,
        _pages(root),
        {node["Node Type"] for node in _nodes(root)},
        whole_rows=connection.get_server_version().major < 18,
    )


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _pages(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])
