"""Guards of the query plans: every statement of the queue finds its rows by an index.

The statements run in transactions that are rolled back, on a queue of 20,000 rows.
"""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cli.dev.postgres import EmbeddedPostgres
from tests.support.crowded_queue import CROWD, crowded_database

# The statistics after a vacuum of an empty table. The planner scales them by the current number of
# pages, and a session may keep such a plan while the queue grows.
_KNOWN_AS_EMPTY = """
UPDATE pg_class SET reltuples = 0, relpages = 100
WHERE oid = 'delivery_queue'::regclass
    OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'delivery_queue'::regclass)
"""


@pytest.fixture(scope="session")
async def burst(postgres: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A connection to an analysed database with the crowded queue."""
    async with crowded_database(postgres, "query_plans", range(-30, 8)) as connection:
        await connection.execute(CROWD)
        await connection.execute("VACUUM ANALYZE")
        yield connection


@pytest.fixture(params=["analysed", "vacuumed when it was empty"])
async def crowded(burst: Any, request: pytest.FixtureRequest) -> Any:
    """The connection, with correct statistics and with those of an empty queue."""
    # Also removes index entries of rows that other tests rolled back.
    await burst.execute("VACUUM ANALYZE delivery_queue")
    if request.param != "analysed":
        await burst.execute(_KNOWN_AS_EMPTY)
    return burst
