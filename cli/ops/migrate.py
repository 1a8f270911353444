"""Runs the migrations, for `postrider migrate` and `postrider run`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

import migrations
from cli.ops.operator import present_operator
from core.errors import ConfigurationError, Unavailable
from core.operator_audit import INSERT_OPERATOR_ENTRY, Operator, operator_entry
from core.postgres.connect import Connector
from core.postgres.pool import CONNECTION_ERRORS
from core.settings import DatabaseSettings

_CAN_RECORD = """
SELECT EXISTS (
    SELECT FROM pg_attribute
    WHERE attrelid = to_regclass('audit_entries') AND attname = 'user_agent' AND NOT attisdropped
)
"""

_SCRIPTS = Path(next(iter(migrations.__path__)))


def migrate(
    settings: DatabaseSettings,
    *,
    down_to: str | None = None,
    lock_timeout_seconds: float = 4.0,
    announce: Callable[[str], None] = lambda _: None,
) -> None:
    """Migrate the schema to this release's revision, or down to `down_to` (a revision or "base").

    Runs an event loop. Each step is announced, and audited unless the database was empty. A failed
    step is rolled back. So is one that waits too long for a lock, because all queries would queue
    behind it. Raises ConfigurationError and Unavailable.
    """

    recorder = _Recorder(present_operator())

    def on_version_apply(*, ctx: Any, step: Any, **_: Any) -> None:
        verb = "applied" if step.is_upgrade else "undid"
        recorder.record(ctx.connection, verb, step)
        announce(f"{verb} {step.up_revision_id}")

    config = _config()
    # Without the limit of queries, because a migration may take longer. env.py sets its own.
    config.attributes["connector"] = Connector(
        settings, "postrider-migrate", limit_statements=False
    )
    config.attributes["lock_timeout_seconds"] = lock_timeout_seconds
    config.attributes["on_version_apply"] = on_version_apply
    try:
        if down_to is None:
            command.upgrade(config, "head")
        else:
            command.downgrade(config, down_to)
    except CommandError as error:
        raise ConfigurationError(f"cannot migrate: {error}") from None
    except DBAPIError as error:
        if error.statement is None:
            raise ConfigurationError(
                f"cannot connect to WEBHOOK_DATABASE_URL: {error.orig}"
            ) from error
        if getattr(error.orig, "sqlstate", None) == asyncpg.LockNotAvailableError.sqlstate:
            raise ConfigurationError(
                "the migration was rolled back, because another session locks its tables: "
                "run `postrider migrate` again when that session has ended"
            ) from error
        raise ConfigurationError(
            f"the migration failed and was rolled back: {error.orig}"
        ) from error
    except CONNECTION_ERRORS as error:
        raise Unavailable(
            "the database cannot be reached; check WEBHOOK_DATABASE_URL and that PostgreSQL runs "
            f"({type(error).__name__}: {error})",
            reason="DATABASE_UNAVAILABLE",
        ) from error
    except ValueError:
        # The error text may contain a part of the password.
        raise ConfigurationError("WEBHOOK_DATABASE_URL is not a PostgreSQL URL") from None


class _Recorder:
    """Writes the audit entry of a step in its transaction."""

    def __init__(self, operator: Operator):
        self._operator = operator
        self._began_empty = False

    def record(self, connection: Connection, verb: str, step: Any) -> None:
        if step.is_upgrade and not step.source_revision_ids:
            self._began_empty = True
        # Old revisions have no audit log, or one with fewer columns.
        if self._began_empty or not connection.scalar(text(_CAN_RECORD)):
            return
        entry = operator_entry(
            self._operator,
            action="Migrate",
            resource=f"schema:{step.up_revision_id}",
            comment=verb,
        )
        connection.exec_driver_sql(INSERT_OPERATOR_ENTRY, entry)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.set_main_option("path_separator", "os")
    return config
