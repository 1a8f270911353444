"""The environment of Alembic: one transaction per migration, one migrator at a time.

`cli/ops/migrate.py` passes the connection settings. There is no alembic.ini.
"""

import asyncio
from time import monotonic, sleep

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from core.models import Base

STATEMENT_TIMEOUT_SECONDS = 60.0
# The wait for another migrator. Afterwards there is usually nothing left to migrate.
MIGRATOR_TIMEOUT_SECONDS = 600.0
MIGRATOR_POLL_SECONDS = 0.1
# An arbitrary constant that all releases share.
MIGRATION_LOCK = 0x706F7374


def _run(connection: Connection) -> None:
    _wait_for_others(connection)
    _set_timeouts(
        connection, context.config.attributes["lock_timeout_seconds"], STATEMENT_TIMEOUT_SECONDS
    )
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        on_version_apply=context.config.attributes.get("on_version_apply"),
    )
    with context.begin_transaction():
        context.run_migrations()


def _wait_for_others(connection: Connection) -> None:
    """Take the lock of migrators. Raises CommandError after MIGRATOR_TIMEOUT_SECONDS.

    Polls, because waiting in PostgreSQL keeps a transaction open. CREATE INDEX CONCURRENTLY of the
    other migrator would wait for that transaction: a deadlock.
    """
    attempt = text("SELECT pg_try_advisory_lock(:key)")
    until = monotonic() + MIGRATOR_TIMEOUT_SECONDS
    while not connection.scalar(attempt, {"key": MIGRATION_LOCK}):
        connection.rollback()
        if monotonic() > until:
            raise CommandError(
                f"another migrator has held the lock for {MIGRATOR_TIMEOUT_SECONDS:.0f} s;"
                " look it up in pg_stat_activity"
            )
        sleep(MIGRATOR_POLL_SECONDS)


def _set_timeouts(connection: Connection, lock_seconds: float, statement_seconds: float) -> None:
    set_config = text("SELECT set_config(:name, :value, false)")
    for name, seconds in (("lock_timeout", lock_seconds), ("statement_timeout", statement_seconds)):
        connection.execute(set_config, {"name": name, "value": f"{seconds * 1000:.0f}ms"})


async def _run_online() -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=context.config.attributes["connector"].connect,
        poolclass=NullPool,
    )
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_run)
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql", target_metadata=Base.metadata, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(_run_online())
