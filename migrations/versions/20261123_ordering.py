"""Ordered delivery: ordering keys of events, ordered configs, and blocked deliveries.

Safe beside the previous release: new columns have defaults, a CHECK becomes wider, and no delivery
is ordered until a config is. Servers of the previous release ignore ordering keys. Its engines do
not promote, so the sweep of a new engine does. Locks: ACCESS EXCLUSIVE for a moment on events and
webhook_configs. On delivery_queue the lock lasts while its rows are read, about a second per
million. The new indexes are empty.
"""

from alembic import op

revision = "20261123_ordering"
down_revision = "20261123_breaker"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE events ADD COLUMN ordering_key TEXT;
COMMENT ON COLUMN events.ordering_key IS 'In order with others of this key; null: in none';
ALTER TABLE webhook_configs ADD COLUMN ordered BOOLEAN DEFAULT false NOT NULL;
COMMENT ON COLUMN webhook_configs.ordered IS 'Events with an ordering key go in order';
ALTER TABLE delivery_queue
    ADD COLUMN ordering_key TEXT,
    ADD COLUMN ordering_position BIGINT,
    DROP CONSTRAINT delivery_queue_state_open,
    ADD CONSTRAINT delivery_queue_state_open
        CHECK (state IN ('ready', 'parked', 'leased', 'blocked')),
    ADD CONSTRAINT delivery_queue_order_whole CHECK (
        (state = 'blocked') = (due_at = 'infinity')
        AND (state <> 'blocked' OR ordering_key IS NOT NULL)
        AND (ordering_key IS NULL) = (ordering_position IS NULL));
COMMENT ON COLUMN delivery_queue.state IS 'ready, parked, leased or blocked';
COMMENT ON COLUMN delivery_queue.ordering_key IS 'Goes in order with others of this key and config; null: in none';
COMMENT ON COLUMN delivery_queue.ordering_position IS 'Its place in that order';
CREATE UNIQUE INDEX delivery_queue_first ON delivery_queue (webhook_id, ordering_key)
    WHERE ordering_key IS NOT NULL AND state <> 'blocked';
CREATE UNIQUE INDEX delivery_queue_blocked ON delivery_queue (webhook_id, ordering_key, ordering_position)
    WHERE state = 'blocked';
CREATE INDEX delivery_queue_blocked_of_webhook ON delivery_queue (webhook_id, id)
    WHERE state = 'blocked'
"""

# Blocked deliveries continue without an order, because the previous release has none.
DOWNGRADE = """
DROP INDEX delivery_queue_blocked_of_webhook;
DROP INDEX delivery_queue_blocked;
DROP INDEX delivery_queue_first;
ALTER TABLE delivery_queue DROP CONSTRAINT delivery_queue_order_whole;
UPDATE delivery_queue SET state = 'parked', due_at = now() WHERE state = 'blocked';
ALTER TABLE delivery_queue
    DROP COLUMN ordering_key,
    DROP COLUMN ordering_position,
    DROP CONSTRAINT delivery_queue_state_open,
    ADD CONSTRAINT delivery_queue_state_open CHECK (state IN ('ready', 'parked', 'leased'));
COMMENT ON COLUMN delivery_queue.state IS 'ready, parked or leased';
ALTER TABLE webhook_configs DROP COLUMN ordered;
ALTER TABLE events DROP COLUMN ordering_key
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE.split(";\n"):
        op.execute(statement)
