"""The rules of docs/decisions/migrations.md that the text of a migration can break."""

import re
from collections.abc import Iterator
from importlib import import_module

import pytest

from cli.startup import revisions

#: Each event adds rows to these tables.
_BIG = "events|deliveries|delivery_queue|finished_deliveries|attempts|idempotency_keys"
#: Migrations up to this one precede the first release, so they index empty tables.
_FIRST_RELEASE = "20261123_signatures"

_BREAKS = {
    r"\bDROP (TABLE|COLUMN)\b": "the previous release reads it: drop it one release later",
    r"\bRENAME\b": "the previous release uses the old name: add the new one beside it",
    r"\bADD COLUMN (?!.*\bDEFAULT\b).*\bNOT NULL\b": "the previous release does not set it",
    r"\bALTER COLUMN \w+ (SET NOT NULL|TYPE)\b": "the previous release uses the old column",
    r"\b(lock_timeout|statement_timeout)\b": "migrations/env.py sets them for every step",
}
_BIG_INDEX = re.compile(rf"CREATE (UNIQUE )?INDEX (?!CONCURRENTLY).*\bON ({_BIG})\b")


def breaks(statement: str, *, first_release: bool = False) -> Iterator[str]:
    """Yield the rules that this statement of an upgrade breaks."""
    # One clause at a time, so that a DEFAULT counts only for its own column.
    for clause in statement.split(",\n"):
        for pattern, reason in _BREAKS.items():
            if re.search(pattern, clause):
                yield reason
    if not first_release and _BIG_INDEX.search(statement):
        yield "the build blocks writes: use CREATE INDEX CONCURRENTLY"


@pytest.mark.parametrize("revision", revisions())
def test_migration_is_safe_beside_the_previous_release(revision: str) -> None:
    module = import_module(f"migrations.versions.{revision}")
    first_release = revision <= _FIRST_RELEASE
    # Generated statements are left to the reviewer.
    upgrade = getattr(module, "UPGRADE", "")
    found = [
        f"{statement.strip()[:80]}: {reason}"
        for statement in upgrade.split(";\n")
        for reason in breaks(statement, first_release=first_release)
    ]
    assert found == []
    if revision != revisions()[0]:
        assert "Safe beside the previous release" in (module.__doc__ or "")
        assert callable(module.downgrade)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE events DROP COLUMN payload",
        "DROP TABLE attempts",
        "ALTER TABLE events RENAME COLUMN type TO kind",
        "ALTER TABLE events ADD COLUMN a TEXT NOT NULL,\n    ADD COLUMN b TEXT DEFAULT '' NOT NULL",
        "ALTER TABLE events ALTER COLUMN not_before SET NOT NULL",
        "ALTER TABLE events ALTER COLUMN id TYPE TEXT",
        "SET LOCAL lock_timeout = 0",
        "CREATE INDEX x ON events (type)",
        "CREATE UNIQUE INDEX x ON attempts (id)",
    ],
)
def test_rules_refuse_an_unsafe_statement(statement: str) -> None:
    assert list(breaks(statement))


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE events ADD COLUMN a TEXT",
        "ALTER TABLE events ADD COLUMN a TEXT DEFAULT '' NOT NULL",
        "CREATE INDEX CONCURRENTLY x ON events (type)",
        "CREATE INDEX x ON webhook_configs (url)",
    ],
)
def test_rules_accept_a_safe_statement(statement: str) -> None:
    assert list(breaks(statement)) == []
