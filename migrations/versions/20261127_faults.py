"""Which of a delivery's attempts were broken by a fault of ours: they use up no retries.

Safe beside the previous release, whose own such attempts go on using them up. Locks: ACCESS
EXCLUSIVE on delivery_queue for a moment; nothing is rewritten.
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
