"""The trace of the call that published an event, so that deliveries can link to it.

Safe beside the previous release, which neither writes nor reads it. Locks: ACCESS EXCLUSIVE on
events and its partitions for a moment. No row is rewritten.
"""

from alembic import op

revision = "20261125_traces"
down_revision = "20261125_redeliveries"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE events ADD COLUMN trace_parent TEXT;
COMMENT ON COLUMN events.trace_parent IS 'W3C traceparent of the call that published it; null: it had none'
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute("ALTER TABLE events DROP COLUMN trace_parent")
