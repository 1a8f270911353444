"""What EXPLAIN is put before, so that it shows the plan that a session would use.

Given a statement with arguments, EXPLAIN plans for these alone, whatever `plan_cache_mode` says.
"""

import itertools
from collections.abc import Sequence
from typing import Any

PLAN_MODES = ("force_custom_plan", "force_generic_plan")

_numbers = itertools.count()


async def planned_by(connection: Any, mode: str, statement: str, arguments: Sequence[Any]) -> str:
    """An EXECUTE of the statement with these arguments, planned as `mode` says from here on."""
    name = f"planned_{next(_numbers)}"
    await connection.execute(f"SET plan_cache_mode = {mode}")
    await connection.execute(f"PREPARE {name} AS {statement}")
    return await execution(connection, name, statement, arguments)


async def execution(connection: Any, name: str, statement: str, arguments: Sequence[Any]) -> str:
    """An EXECUTE with these arguments of what was prepared under a name."""
    types = (await connection.prepare(statement)).get_parameters()
    values = [
        str(await connection.fetchval(f"SELECT quote_nullable(($1::{kind.name})::text)", value))
        for kind, value in zip(types, arguments, strict=True)
    ]
    return f"EXECUTE {name}({', '.join(values)})" if values else f"EXECUTE {name}"
