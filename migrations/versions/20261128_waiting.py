"""An index of parked and blocked deliveries by event, so that listing them reads no whole backlog.

Safe beside the previous release, which does not use it. Locks: none that block writes. The build
takes seconds per million parked deliveries. An interrupted run can be repeated.
"""

from alembic import op

revision = "20261128_waiting"
down_revision = "20261127_faults"
branch_labels = None
depends_on = None

UPGRADE = """
DROP INDEX CONCURRENTLY IF EXISTS delivery_queue_waiting_of_event;
CREATE INDEX CONCURRENTLY delivery_queue_waiting_of_event ON delivery_queue (event_id)
    WHERE greatest(state) IN ('parked', 'blocked')
"""

DOWNGRADE = "DROP INDEX delivery_queue_waiting_of_event"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in UPGRADE.split(";\n"):
            op.execute(statement)


def downgrade() -> None:
    op.execute(DOWNGRADE)
