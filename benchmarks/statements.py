"""Counts executed statements in PostgreSQL's log.

pg_stat_statements is not in every build and needs a restart. `log_statement` is in every build and
includes BEGIN and COMMIT. Logging costs CPU, so statements are counted in a separate pass.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from benchmarks.stack import Stack

# Further lines of a statement start with a tab, without the prefix.
_LINE = re.compile(rb"^executed by (\S*): LOG:  (?:execute|statement)", re.MULTILINE)
_PREFIX = "executed by %a: "


class Statements:
    """Return the statements of this pass by application name."""

    def __init__(self, stack: Stack):
        self._log = stack.postgres.data_dir.with_name(f"{stack.postgres.data_dir.name}.log")
        self._start = self._log.stat().st_size

    def so_far(self) -> Counter[str]:
        with self._log.open("rb") as log:
            log.seek(self._start)
            return executed_by(log.read())

    def of_ours(self) -> int:
        """Return those of servers and engines."""
        count = self.so_far()
        ours = sum(count[name] for name in count if name.startswith("postrider-"))
        if not ours:
            raise RuntimeError(f"PostgreSQL logged no statement of ours in {self._log}")
        return ours


def executed_by(log: bytes) -> Counter[str]:
    """Return the statements of a log by application name."""
    return Counter(name.decode() for name in _LINE.findall(log))


@asynccontextmanager
async def counted(stack: Stack) -> AsyncIterator[Statements]:
    """Count every statement while the context is open."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        await connection.execute(f"ALTER SYSTEM SET log_line_prefix = '{_PREFIX}'")
        await connection.execute("ALTER SYSTEM SET log_statement = 'all'")
        await _reload(connection)
        yield Statements(stack)
        await connection.execute("ALTER SYSTEM RESET ALL")
        await _reload(connection)
    finally:
        await connection.close()


async def _reload(connection: asyncpg.Connection) -> None:
    """Reload the configuration, and wait until this session has it."""
    await connection.execute("SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)
