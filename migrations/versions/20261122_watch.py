"""Which transaction recorded an attempt: the order in which a live tail reads them.

Safe beside the previous release: the database fills the column in, whoever inserts. Locks: ACCESS
EXCLUSIVE on attempts for a moment; the index is built on what is there, and nothing is recorded as
long as that takes.
"""

from alembic import op

revision = "20261122_watch"
down_revision = "20261122_contract"
branch_labels = None
depends_on = None

# First without a default: with one, what is there would count as recorded now.
UPGRADE = """
ALTER TABLE attempts ADD COLUMN recorded_xid BIGINT;
ALTER TABLE attempts ALTER COLUMN recorded_xid SET DEFAULT pg_current_xact_id()::text::bigint;
COMMENT ON COLUMN attempts.recorded_xid IS 'Transaction that recorded it; null: before there was this';
CREATE INDEX attempts_recorded ON attempts (recorded_xid)
"""

DOWNGRADE = """
DROP INDEX attempts_recorded;
ALTER TABLE attempts DROP COLUMN recorded_xid
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE.split(";\n"):
        op.execute(statement)
