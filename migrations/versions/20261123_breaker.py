"""The breaker of a webhook config, shared by all engines, and a new deactivation reason.

Safe beside the previous release: new columns have defaults, and a CHECK becomes wider. Locks:
ACCESS EXCLUSIVE on webhook_configs while its rows, which are few, are checked.
"""

from alembic import op

revision = "20261123_breaker"
down_revision = "20261122_watch"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE webhook_configs
    ADD COLUMN breaker_open_until TIMESTAMP WITH TIME ZONE,
    ADD COLUMN breaker_trips INTEGER DEFAULT 0 NOT NULL,
    ADD CONSTRAINT webhook_configs_breaker_trips_counted CHECK (breaker_trips >= 0),
    DROP CONSTRAINT webhook_configs_deactivation_reason_known,
    ADD CONSTRAINT webhook_configs_deactivation_reason_known
        CHECK (deactivation_reason IN ('paused', 'failures', 'admin', 'gone'));
COMMENT ON COLUMN webhook_configs.breaker_open_until IS 'Nothing is sent before, then one probe at a time; null: closed';
COMMENT ON COLUMN webhook_configs.breaker_trips IS 'Times it opened since it was closed'
"""

DOWNGRADE = """
UPDATE webhook_configs SET deactivation_reason = 'failures' WHERE deactivation_reason = 'gone';
ALTER TABLE webhook_configs
    DROP CONSTRAINT webhook_configs_deactivation_reason_known,
    ADD CONSTRAINT webhook_configs_deactivation_reason_known
        CHECK (deactivation_reason IN ('paused', 'failures', 'admin')),
    DROP COLUMN breaker_open_until, DROP COLUMN breaker_trips
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE.split(";\n"):
        op.execute(statement)
