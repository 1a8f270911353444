"""Migrations, the schema that they create, and their locks."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import create_async_engine

from cli.dev.postgres import EmbeddedPostgres
from cli.ops.migrate import migrate
from cli.startup import head, require_schema, revisions
from core.errors import ConfigurationError, Unavailable
from core.models import Base
from core.settings import DatabaseSettings
from tests.conftest import database_settings

_MIGRATE = """
import sys
from cli.ops.migrate import migrate
from core.settings import DatabaseSettings
migrate(DatabaseSettings(database_url=sys.argv[1]), announce=print)
"""

_RELATIONS = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p', 'v', 'S', 'i', 'I')
"""
_PARTITIONS = "SELECT relname FROM pg_class WHERE relispartition"
_ROUTINES_AND_TYPES = """
SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')
"""

#: Queries whose rows are equal in a migrated database and in one created from the models.
_SCHEMA = {
    "columns": """
        SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = 'public'
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, contype::text, convalidated,
            pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
    """,
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "comments": """
        SELECT objoid::regclass::text, objsubid, description
        FROM pg_description WHERE classoid = 'pg_class'::regclass AND objoid IN (
            SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace
        )
    """,
    "storage and partitioning": """
        SELECT relname, relkind::text, array(SELECT unnest(reloptions) ORDER BY 1),
            pg_get_partkeydef(oid)
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
    """,
}

REVISIONS = revisions()


@pytest.fixture
async def empty_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    async with _database(postgres, "migrations_empty") as url:
        yield url


async def test_downgrade_to_an_empty_schema_and_upgrade(empty_url: str) -> None:
    async with _connected(empty_url) as connection:
        announced: list[str] = []
        await _migrate(empty_url, announce=announced.append)
        assert announced == [f"applied {revision}" for revision in REVISIONS]
        first = await _schema(connection)

        announced.clear()
        await _migrate(empty_url, down_to="base", announce=announced.append)
        assert announced == [f"undid {revision}" for revision in reversed(REVISIONS)]
        left = {row[0] for row in await connection.fetch(_RELATIONS)}
        assert left == {"alembic_version", "alembic_version_pkc"}
        assert await connection.fetch("SELECT * FROM alembic_version") == []
        assert await connection.fetch(_ROUTINES_AND_TYPES) == []

        await _migrate(empty_url)
        assert await _schema(connection) == first


async def test_migrate_changes_nothing_in_a_current_schema(database_url: str) -> None:
    announced: list[str] = []

    await _migrate(database_url, announce=announced.append)

    assert announced == []


async def test_migrate_audits_each_step_unless_the_database_was_empty(
    pool: Any, database_url: str
) -> None:
    assert await pool.fetchval("SELECT count(*) FROM audit_entries") == 0

    await _migrate(database_url, down_to="20261123_signatures")
    await _migrate(database_url)

    rows = await pool.fetch("SELECT * FROM audit_entries WHERE action = 'Migrate' ORDER BY id")
    later = [name for name in REVISIONS if name > "20261123_signatures"]
    assert [(row["resource"], row["comment"]) for row in rows] == [
        *((f"schema:{name}", "undid") for name in reversed(later)),
        *((f"schema:{name}", "applied") for name in later),
    ]
    assert rows[0]["actor"].startswith("cli:")
    assert rows[0]["user_agent"].startswith("postrider/")
    assert rows[0]["caller_address"]


async def test_migrations_and_models_create_the_same_schema(
    postgres: EmbeddedPostgres, database_url: str
) -> None:
    async with _database(postgres, "migrations_models") as url:
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url)
        )
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()
        async with _connected(url) as modelled, _connected(database_url) as migrated:
            from_models = await _schema(modelled)
            from_migrations = await _schema(migrated)

    for part, rows in from_models.items():
        assert from_migrations[part] == rows, part
    assert len(from_models["constraints"]) > len(Base.metadata.tables)


async def test_tables_have_comments(pool: Any) -> None:
    rows = await pool.fetch("""
        SELECT relname, obj_description(oid, 'pg_class') AS comment FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
            AND NOT relispartition AND relname <> 'alembic_version'
    """)

    assert {row["relname"] for row in rows} == set(Base.metadata.tables)
    assert [row["relname"] for row in rows if not row["comment"]] == []


async def test_tables_by_day_have_a_default_partition(pool: Any) -> None:
    """So a missing partition refuses no row. The partitions by `kept` have every value."""
    partitioned = await pool.fetch(
        "SELECT partrelid::regclass::text FROM pg_partitioned_table WHERE partstrat = 'r'"
    )

    defaults = await pool.fetch(
        "SELECT inhparent::regclass::text FROM pg_inherits JOIN pg_class ON oid = inhrelid"
        " WHERE pg_get_expr(relpartbound, oid) = 'DEFAULT'"
    )

    assert sorted(partitioned) == sorted(defaults)
    assert len(partitioned) == 3


async def test_new_uuid7_returns_sortable_version_7_ids(pool: Any) -> None:
    async with pool.acquire() as connection:
        earlier = await connection.fetchval("SELECT clock_timestamp()")
        made = [await connection.fetchval("SELECT new_uuid7()") for _ in range(50)]
        later = await connection.fetchval("SELECT clock_timestamp()")

    assert {(made_id.version, made_id.variant) for made_id in made} == {
        (7, "specified in RFC 4122")
    }
    assert len(set(made)) == 50
    times = [made_id.int >> 80 for made_id in made]
    assert times == sorted(times)
    assert int(earlier.timestamp() * 1000) <= times[0] <= times[-1] <= later.timestamp() * 1000 + 1


async def test_concurrent_migrators_apply_each_step_once(empty_url: str) -> None:
    # Alembic keeps its state in a module, so each migrator needs its own process.
    migrators = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", _MIGRATE, empty_url, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    outputs = [await migrator.communicate() for migrator in migrators]

    assert [migrator.returncode for migrator in migrators] == [0, 0, 0]
    applied = "".join(f"applied {revision}\n" for revision in REVISIONS)
    assert sorted(out.decode() for out, _ in outputs) == ["", "", applied]


async def test_migrate_waits_for_another_migrator(empty_url: str) -> None:
    # The time limit of a statement is shorter than the wait, and does not end it.
    settings = DatabaseSettings(
        database_url=SecretStr(empty_url), database_statement_timeout_seconds=0.1
    )
    async with _connected(empty_url) as connection:
        # The literal key, because other releases must use the same one.
        await connection.execute("SELECT pg_advisory_lock(x'706F7374'::int)")
        waiting = asyncio.create_task(asyncio.to_thread(migrate, settings))
        await _until_waiting_for(connection, 1.3)
        assert await connection.fetch(_RELATIONS) == []
        await connection.execute("SELECT pg_advisory_unlock_all()")
        await waiting
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == head()


async def test_migrate_rolls_a_step_back_if_a_table_stays_locked(
    database_url: str,
) -> None:
    # A single step, because earlier steps stay applied when a later one is rolled back.
    first = "20261121_initial"
    await _migrate(database_url, down_to=first)
    async with _connected(database_url) as connection:
        before = await _schema(connection)
        # Like a forgotten psql session. The migration drops other tables before this one.
        async with connection.transaction():
            await connection.execute("LOCK TABLE events IN ACCESS SHARE MODE")
            with pytest.raises(ConfigurationError, match=r"rolled back.*`postrider migrate` again"):
                await _migrate(database_url, down_to="base", lock_timeout_seconds=0.1)
        assert await _schema(connection) == before
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == first

        await _migrate(database_url, down_to="base", lock_timeout_seconds=0.1)


async def test_migrations_run_with_lock_and_statement_timeouts(empty_url: str) -> None:
    async with _connected(empty_url) as connection:
        await connection.execute("""
            CREATE SCHEMA observer;
            CREATE TABLE observer.seen (tag text, lock text, statement text);
            CREATE FUNCTION observer.record() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
                INSERT INTO observer.seen VALUES (
                    tg_tag, current_setting('lock_timeout'), current_setting('statement_timeout'));
            END $$;
            CREATE EVENT TRIGGER record ON ddl_command_start EXECUTE FUNCTION observer.record();
        """)
        await _migrate(empty_url)
        await _migrate(empty_url, down_to="base")
        seen = await connection.fetch("SELECT * FROM observer.seen")

    assert {row["tag"] for row in seen} >= {"CREATE TABLE", "CREATE INDEX", "DROP TABLE"}
    assert {(row["lock"], row["statement"]) for row in seen} == {("4s", "1min")}


async def test_migrate_names_an_unknown_revision(database_url: str) -> None:
    with pytest.raises(ConfigurationError, match="20990101_unknown"):
        await _migrate(database_url, down_to="20990101_unknown")


async def test_migrate_refuses_a_schema_of_a_newer_release(database_url: str) -> None:
    await _stamp(database_url, "20990101_newer")

    with pytest.raises(ConfigurationError, match="20990101_newer"):
        await _migrate(database_url)


async def test_migrate_names_the_setting_of_a_missing_database(postgres: EmbeddedPostgres) -> None:
    with pytest.raises(ConfigurationError, match=r"WEBHOOK_DATABASE_URL.*nowhere"):
        await _migrate(postgres.url("nowhere"))


@pytest.mark.parametrize(
    "url", ["mysql://localhost/postrider", "postgresql://me:hunter2@host:port/postrider"]
)
async def test_migrate_refuses_an_invalid_url_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="WEBHOOK_DATABASE_URL") as refused:
        await _migrate(url)
    assert "hunter2" not in str(refused.value)


async def test_migrate_is_unavailable_without_a_server() -> None:
    with pytest.raises(Unavailable, match="WEBHOOK_DATABASE_URL"):
        await _migrate("postgresql://postgres@127.0.0.1:1/postrider")


async def test_require_schema_accepts_the_current_schema(pool: Any) -> None:
    await require_schema(pool)


async def test_require_schema_refuses_an_empty_database(empty_url: str) -> None:
    async with asyncpg.create_pool(empty_url, min_size=1, max_size=1) as pool:
        with pytest.raises(ConfigurationError, match=f"at nothing.*needs {head()}.*migrate"):
            await require_schema(pool)


async def test_require_schema_refuses_a_downgraded_schema(database_url: str, pool: Any) -> None:
    await _migrate(database_url, down_to="base")

    with pytest.raises(ConfigurationError, match="at nothing"):
        await require_schema(pool)


async def test_require_schema_refuses_an_older_schema(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = head()
    monkeypatch.setattr("cli.startup.head", lambda: "20990101_newer")

    with pytest.raises(ConfigurationError, match=f"at {older}.*needs 20990101_newer"):
        await require_schema(pool)


async def test_require_schema_accepts_a_newer_schema(database_url: str, pool: Any) -> None:
    await _stamp(database_url, "20990101_newer")

    await require_schema(pool)


async def _migrate(url: str, **options: Any) -> None:
    """Migrate in a thread, because `migrate` runs its own event loop."""
    await asyncio.to_thread(migrate, database_settings(url), **options)


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _database(postgres: EmbeddedPostgres, name: str) -> AsyncIterator[str]:
    async with _connected(postgres.url()) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
        try:
            yield postgres.url(name)
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _stamp(url: str, revision: str) -> None:
    async with _connected(url) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = $1", revision)


async def _schema(connection: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of _SCHEMA, without partitions and Alembic's table."""
    partitions = {row[0] for row in await connection.fetch(_PARTITIONS)}
    ignored = partitions | {"alembic_version"}
    return {
        part: sorted(
            (tuple(row) for row in await connection.fetch(query) if row[0] not in ignored), key=repr
        )
        for part, query in _SCHEMA.items()
    }


async def _until_waiting_for(connection: Any, seconds: float) -> None:
    """Return when a migrator has waited this long for the lock."""
    query = """
        SELECT extract(epoch FROM clock_timestamp() - backend_start) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '%pg_try_advisory_lock%'
            AND application_name = 'postrider-migrate'
    """
    async with asyncio.timeout(10):
        while (await connection.fetchval(query) or 0) < seconds:
            pass
