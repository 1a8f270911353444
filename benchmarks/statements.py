"""How many statements PostgreSQL executes, counted where it executes them: in its own log.

pg_stat_statements is not in every build, and its view needs a restart. `log_statement` is in all of
them and sees whatever is executed, BEGIN and COMMIT included. Writing the log costs CPU, so what is
counted here is a pass of its own, never the one whose time is taken.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from benchmarks.stack import Stack

# A statement's further lines begin with a tab; only its first has the prefix.
_LINE = re.compile(rb"^executed by (\S*): LOG:  (?:execute|statement)", re.MULTILINE)
_PREFIX = "executed by %a: "


class Statements:
    """Statements executed since the beginning of the pass, by the name of the application."""

    def __init__(self, stack: Stack):
        self._log = stack.postgres.data_dir.with_name(f"{stack.postgres.data_dir.name}.log")
        self._start = self._log.stat().st_size

    def so_far(self) -> Counter[str]:
        with self._log.open("rb") as log:
            log.seek(self._start)
            return executed_by(log.read())

    def of_ours(self) -> int:
        """Those of servers and engines together."""
        count = self.so_far()
        ours = sum(count[name] for name in count if name.startswith("postrider-"))
        if not ours:
            raise RuntimeError(f"PostgreSQL logged no statement of ours in {self._log}")
        return ours


def executed_by(log: bytes) -> Counter[str]:
    """Statements in a log by the name of the application that sent them."""
    return Counter(name.decode() for name in _LINE.findall(log))


@asynccontextmanager
async def counted(stack: Stack) -> AsyncIterator[Statements]:
    """Counts every statement until the end of the context."""
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
    """Every session hears of it by a signal, as we do, or a moment later."""
    await connection.execute("SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)
