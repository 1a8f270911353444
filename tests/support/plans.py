"""Statements for EXPLAIN that show the plan that a session would use.

With a parametrized statement, EXPLAIN ignores `plan_cache_mode` and plans for the arguments.
"""

import itertools
from collections.abc import Sequence
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
