"""Limits and rotation of configs, schemas of event types, and details of attempts.

Safe beside the previous release: new columns have defaults, a CHECK becomes wider, and nothing is
renamed or removed. Locks: ACCESS EXCLUSIVE for a moment on each table. Building an index takes as
long as reading its table, which is long for a large history.
"""

from alembic import op

revision = "20261122_contract"
down_revision = "20261121_initial"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE webhook_configs
    ADD COLUMN headers JSONB DEFAULT '{}' NOT NULL,
    ADD COLUMN timeout_seconds DOUBLE PRECISION,
    ADD COLUMN rate_limit DOUBLE PRECISION DEFAULT 0 NOT NULL,
    ADD COLUMN rate_used_until TIMESTAMP WITH TIME ZONE,
    ADD COLUMN max_in_flight INTEGER DEFAULT 0 NOT NULL,
    ADD COLUMN previous_secret_ciphertext BYTEA,
    ADD COLUMN previous_secret_key_id TEXT,
    ADD COLUMN previous_secret_expires_at TIMESTAMP WITH TIME ZONE,
    DROP CONSTRAINT webhook_configs_deactivation_reason_known,
    ADD CONSTRAINT webhook_configs_deactivation_reason_known
        CHECK (deactivation_reason IN ('paused', 'failures', 'admin')),
    ADD CONSTRAINT webhook_configs_timeout_bounded CHECK (timeout_seconds BETWEEN 1 AND 30),
    ADD CONSTRAINT webhook_configs_limits_counted CHECK (rate_limit >= 0 AND max_in_flight >= 0),
    ADD CONSTRAINT webhook_configs_previous_secret_whole CHECK (
        (previous_secret_ciphertext IS NULL) = (previous_secret_key_id IS NULL)
        AND (previous_secret_key_id IS NULL) = (previous_secret_expires_at IS NULL));
CREATE INDEX webhook_configs_inactive ON webhook_configs (id) WHERE NOT active AND deleted_at IS NULL;
COMMENT ON COLUMN webhook_configs.headers IS 'Sent with every webhook beside our own';
COMMENT ON COLUMN webhook_configs.timeout_seconds IS 'Of one attempt; null: the operator''s timeout';
COMMENT ON COLUMN webhook_configs.rate_limit IS 'Webhooks a second; 0: no limit';
COMMENT ON COLUMN webhook_configs.rate_used_until IS 'Webhooks up to now have used up the rate until then';
COMMENT ON COLUMN webhook_configs.max_in_flight IS 'Per engine process; 0: the operator''s cap';
COMMENT ON COLUMN webhook_configs.previous_secret_ciphertext IS 'Signs too until previous_secret_expires_at';
CREATE INDEX webhook_configs_retired_secret ON webhook_configs (previous_secret_expires_at)
    WHERE previous_secret_expires_at IS NOT NULL;
ALTER TABLE event_types
    ADD COLUMN json_schema TEXT DEFAULT '' NOT NULL,
    ADD COLUMN enforce_schema BOOLEAN DEFAULT false NOT NULL,
    ADD COLUMN example TEXT DEFAULT '' NOT NULL,
    ADD COLUMN deprecated BOOLEAN DEFAULT false NOT NULL;
COMMENT ON COLUMN event_types.json_schema IS 'JSON Schema of its payloads; empty: none';
COMMENT ON COLUMN event_types.enforce_schema IS 'Whether publish refuses what does not match';
COMMENT ON COLUMN event_types.example IS 'A payload; empty: none';
COMMENT ON COLUMN event_types.deprecated IS 'No new subscriptions';
ALTER TABLE events ADD COLUMN not_before TIMESTAMP WITH TIME ZONE;
COMMENT ON COLUMN events.not_before IS 'Delivered no earlier; null: at once';
CREATE INDEX events_of_merchant ON events (merchant_id, id);
ALTER TABLE delivery_queue ADD COLUMN redelivery_of UUID;
COMMENT ON COLUMN delivery_queue.redelivery_of IS 'The delivery it repeats at somebody''s request';
ALTER TABLE finished_deliveries ADD COLUMN redelivery_of UUID;
COMMENT ON COLUMN finished_deliveries.redelivery_of IS 'The delivery it repeats at somebody''s request';
CREATE INDEX finished_deliveries_of_type ON finished_deliveries (merchant_id, event_type, id);
CREATE INDEX finished_deliveries_undelivered ON finished_deliveries (merchant_id, id) WHERE state <> 'delivered';
ALTER TABLE attempts
    ADD COLUMN dns_us INTEGER,
    ADD COLUMN connect_us INTEGER,
    ADD COLUMN first_byte_us INTEGER,
    ADD COLUMN remote_address TEXT,
    ADD COLUMN response_excerpt TEXT DEFAULT '' NOT NULL;
COMMENT ON COLUMN attempts.dns_us IS 'Null: the connection was there already';
COMMENT ON COLUMN attempts.connect_us IS 'TCP and TLS; null: as for dns_us';
COMMENT ON COLUMN attempts.first_byte_us IS 'From request sent to status line';
COMMENT ON COLUMN attempts.remote_address IS 'What was dialled';
COMMENT ON COLUMN attempts.response_excerpt IS 'The first 1 KiB of the body, escaped';
ALTER TABLE audit_entries ADD COLUMN comment TEXT DEFAULT '' NOT NULL;
COMMENT ON COLUMN audit_entries.comment IS 'The reason the caller gave, where one is asked for'
"""

DOWNGRADE = """
ALTER TABLE audit_entries DROP COLUMN comment;
ALTER TABLE attempts
    DROP COLUMN dns_us, DROP COLUMN connect_us, DROP COLUMN first_byte_us,
    DROP COLUMN remote_address, DROP COLUMN response_excerpt;
DROP INDEX finished_deliveries_undelivered;
DROP INDEX finished_deliveries_of_type;
ALTER TABLE finished_deliveries DROP COLUMN redelivery_of;
ALTER TABLE delivery_queue DROP COLUMN redelivery_of;
DROP INDEX events_of_merchant;
ALTER TABLE events DROP COLUMN not_before;
ALTER TABLE event_types
    DROP COLUMN json_schema, DROP COLUMN enforce_schema, DROP COLUMN example,
    DROP COLUMN deprecated;
DROP INDEX webhook_configs_retired_secret;
DROP INDEX webhook_configs_inactive;
UPDATE webhook_configs SET deactivation_reason = 'failures' WHERE deactivation_reason = 'admin';
ALTER TABLE webhook_configs
    DROP CONSTRAINT webhook_configs_deactivation_reason_known,
    ADD CONSTRAINT webhook_configs_deactivation_reason_known
        CHECK (deactivation_reason IN ('paused', 'failures')),
    DROP CONSTRAINT webhook_configs_timeout_bounded,
    DROP CONSTRAINT webhook_configs_limits_counted,
    DROP CONSTRAINT webhook_configs_previous_secret_whole,
    DROP COLUMN headers, DROP COLUMN timeout_seconds, DROP COLUMN rate_limit,
    DROP COLUMN rate_used_until, DROP COLUMN max_in_flight, DROP COLUMN previous_secret_ciphertext,
    DROP COLUMN previous_secret_key_id, DROP COLUMN previous_secret_expires_at
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE.split(";\n"):
        op.execute(statement)
