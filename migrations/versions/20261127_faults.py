"""The number of attempts that failed by an internal error, because those use no retries.

Safe beside the previous release, whose internal errors continue to use retries. Locks: ACCESS
EXCLUSIVE on delivery_queue for a moment. No row is rewritten.
"""

from alembic import op

revision = "20261127_faults"
down_revision = "20261126_ids"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE delivery_queue ADD COLUMN fault_count INTEGER DEFAULT 0 NOT NULL;
COMMENT ON COLUMN delivery_queue.fault_count IS 'Attempts on record that a fault of ours broke'
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute("ALTER TABLE delivery_queue DROP COLUMN fault_count")
