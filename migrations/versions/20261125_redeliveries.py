"""An index of open redeliveries by event, so that RedeliverDeliveries creates no duplicates.

Safe beside the previous release, which does not use it. Locks: none that block writes. The index
contains open redeliveries only, which are few. An interrupted run can be repeated.
"""

from alembic import op

revision = "20261125_redeliveries"
down_revision = "20261124_retention"
branch_labels = None
depends_on = None

UPGRADE = """
DROP INDEX CONCURRENTLY IF EXISTS delivery_queue_redeliveries;
CREATE INDEX CONCURRENTLY delivery_queue_redeliveries ON delivery_queue (event_id)
    WHERE redelivery_of IS NOT NULL
"""

DOWNGRADE = "DROP INDEX delivery_queue_redeliveries"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in UPGRADE.split(";\n"):
            op.execute(statement)


def downgrade() -> None:
    op.execute(DOWNGRADE)
