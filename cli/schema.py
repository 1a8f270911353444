"""Whether the database has the schema that this release needs, asked by every process at its start.

The revisions are read from the names of their files, which sort in the order of the chain: Alembic
and SQLAlchemy would cost an engine 20 MB for as long as it runs.
"""

from pathlib import Path

import asyncpg

import migrations
from core.db import Pool
from core.errors import ConfigurationError


def revisions() -> list[str]:
    """What this release knows, the oldest first."""
    versions = Path(next(iter(migrations.__path__)), "versions")
    return sorted(path.stem for path in versions.glob("[0-9]*.py"))


def head() -> str:
    """The newest revision this release knows."""
    return revisions()[-1]


async def require_schema(pool: Pool) -> None:
    """ConfigurationError when the database is behind this release.

    A schema that is newer is fine: migrations are made to be safe beside the previous release.
    """
    try:
        table = await pool.fetchval("SELECT to_regclass('alembic_version')")
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        raise ConfigurationError(
            "a pooler stands before the database and gives each transaction another connection: "
            "use its session mode, or none (docs/postgresql.md)"
        ) from None
    found = await pool.fetchval("SELECT version_num FROM alembic_version") if table else None
    if found is None or (found in revisions() and found != head()):
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this release needs {head()}: "
            "run `postrider migrate` first"
        )
