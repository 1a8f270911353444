"""The transaction that recorded an attempt. A watch reads attempts in this order.

Safe beside the previous release: the database fills the column for every writer. Locks: ACCESS
EXCLUSIVE on attempts for a moment. No attempt is recorded while the index is built.
"""

from alembic import op

revision = "20261122_watch"
down_revision = "20261122_contract"
branch_labels = None
depends_on = None

# The default comes second, so that existing attempts do not count as recorded now.
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
