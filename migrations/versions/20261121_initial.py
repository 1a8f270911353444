"""The first schema: webhook configs, events, the queue, the history and the audit log.

No previous release exists. Locks: only on new objects.
"""

from alembic import op

revision = "20261121_initial"
down_revision = None
branch_labels = None
depends_on = None

# PostgreSQL before 18 has no uuidv7(). These ids also sort by time (RFC 9562, version 7).
NEW_UUID7 = """
CREATE FUNCTION new_uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(
                uuid_send(gen_random_uuid())
                PLACING substring(
                    int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex')::uuid
$$
"""

TABLES = """
CREATE TABLE event_types (
    name TEXT NOT NULL,
    description TEXT DEFAULT '' NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT event_types_pkey PRIMARY KEY (name),
    CONSTRAINT event_types_name_form CHECK (name ~ '^[a-z0-9_]+([.][a-z0-9_]+)+$' AND length(name) <= 128)
);
COMMENT ON TABLE event_types IS 'Kinds of event that may be published and subscribed to';
COMMENT ON COLUMN event_types.name IS 'Dotted lower-case name';

CREATE TABLE webhook_configs (
    id UUID NOT NULL,
    merchant_id TEXT NOT NULL,
    url TEXT NOT NULL,
    events TEXT[] NOT NULL,
    description TEXT DEFAULT '' NOT NULL,
    secret_ciphertext BYTEA NOT NULL,
    secret_key_id TEXT NOT NULL,
    active BOOLEAN DEFAULT true NOT NULL,
    deactivation_reason TEXT,
    consecutive_failures INTEGER DEFAULT 0 NOT NULL,
    retry_schedule_seconds DOUBLE PRECISION[] DEFAULT '{}' NOT NULL,
    version INTEGER DEFAULT 1 NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    deleted_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT webhook_configs_pkey PRIMARY KEY (id),
    CONSTRAINT webhook_configs_merchant_id_form CHECK (merchant_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    CONSTRAINT webhook_configs_url_form CHECK (url LIKE 'https://%' AND octet_length(url) <= 2048),
    CONSTRAINT webhook_configs_events_count CHECK (cardinality(events) BETWEEN 1 AND 100),
    CONSTRAINT webhook_configs_inactive_has_reason CHECK (active = (deactivation_reason IS NULL)),
    CONSTRAINT webhook_configs_deactivation_reason_known CHECK (deactivation_reason IN ('paused', 'failures')),
    CONSTRAINT webhook_configs_consecutive_failures_counted CHECK (consecutive_failures >= 0),
    CONSTRAINT webhook_configs_retry_schedule_bounded CHECK (cardinality(retry_schedule_seconds) <= 20)
);
CREATE INDEX webhook_configs_of_merchant ON webhook_configs (merchant_id, id) WHERE deleted_at IS NULL;
COMMENT ON TABLE webhook_configs IS 'Registered URLs with their secrets and event filters';
COMMENT ON COLUMN webhook_configs.merchant_id IS 'The merchant_id claim of the token that made it';
COMMENT ON COLUMN webhook_configs.url IS 'Canonical form, sent exactly so';
COMMENT ON COLUMN webhook_configs.events IS 'Event types it receives';
COMMENT ON COLUMN webhook_configs.secret_ciphertext IS 'AES-256-GCM nonce and ciphertext; associated data is the id';
COMMENT ON COLUMN webhook_configs.secret_key_id IS 'Which encryption key made the ciphertext';
COMMENT ON COLUMN webhook_configs.deactivation_reason IS 'Why it is not active';
COMMENT ON COLUMN webhook_configs.consecutive_failures IS 'Failed deliveries since the last delivered one';
COMMENT ON COLUMN webhook_configs.retry_schedule_seconds IS 'Empty: the operator''s schedule';
COMMENT ON COLUMN webhook_configs.version IS 'Counts changes; the etag, and the engines'' cache key';

CREATE TABLE events (
    id UUID NOT NULL,
    merchant_id TEXT NOT NULL,
    type TEXT NOT NULL,
    content_type TEXT NOT NULL,
    payload BYTEA NOT NULL,
    delivery_count INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT events_pkey PRIMARY KEY (id)
)
 PARTITION BY RANGE (id);
COMMENT ON TABLE events IS 'Published events; append-only';
COMMENT ON COLUMN events.id IS 'UUIDv7; seen as webhook-id';
COMMENT ON COLUMN events.payload IS 'Sent byte for byte';
COMMENT ON COLUMN events.delivery_count IS 'Webhook configs that wanted it';

CREATE TABLE idempotency_keys (
    merchant_id TEXT NOT NULL,
    key TEXT NOT NULL,
    content_hash BYTEA NOT NULL,
    event_id UUID NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (merchant_id, key)
);
CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
COMMENT ON TABLE idempotency_keys IS 'Makes publishing safe to repeat; one key, one event';
COMMENT ON COLUMN idempotency_keys.content_hash IS 'SHA-256 of type, content type and payload';

CREATE TABLE delivery_queue (
    id UUID NOT NULL,
    state TEXT NOT NULL,
    due_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    lease_until TIMESTAMP WITH TIME ZONE,
    lease_id UUID,
    webhook_id UUID NOT NULL,
    event_id UUID NOT NULL,
    merchant_id TEXT NOT NULL,
    event_type TEXT NOT NULL,
    attempt_count INTEGER DEFAULT 0 NOT NULL,
    reclaim_count INTEGER DEFAULT 0 NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT delivery_queue_pkey PRIMARY KEY (id),
    CONSTRAINT delivery_queue_state_open CHECK (state IN ('ready', 'parked', 'leased')),
    CONSTRAINT delivery_queue_lease_whole CHECK ((state = 'leased') = (lease_id IS NOT NULL) AND (lease_id IS NULL) = (lease_until IS NULL)),
    CONSTRAINT delivery_queue_counts CHECK (attempt_count >= 0 AND reclaim_count >= 0)
)
 WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 1);
CREATE INDEX delivery_queue_due ON delivery_queue (due_at) WHERE state = 'ready';
CREATE INDEX delivery_queue_lease ON delivery_queue (lease_until) WHERE state = 'leased';
CREATE INDEX delivery_queue_of_webhook ON delivery_queue (webhook_id, due_at) WHERE state <> 'parked';
CREATE INDEX delivery_queue_parked ON delivery_queue (webhook_id, id) WHERE state = 'parked';
COMMENT ON TABLE delivery_queue IS 'Open deliveries; a row leaves when its delivery is finished';
COMMENT ON COLUMN delivery_queue.state IS 'ready, parked or leased';
COMMENT ON COLUMN delivery_queue.due_at IS 'Not attempted before; database time';
COMMENT ON COLUMN delivery_queue.lease_until IS 'When the lease may be taken back';
COMMENT ON COLUMN delivery_queue.lease_id IS 'Fence: who settles must know it';
COMMENT ON COLUMN delivery_queue.attempt_count IS 'Attempts on record';
COMMENT ON COLUMN delivery_queue.reclaim_count IS 'Leases that ended without a result';

CREATE TABLE finished_deliveries (
    id UUID NOT NULL,
    state TEXT NOT NULL,
    webhook_id UUID NOT NULL,
    event_id UUID NOT NULL,
    merchant_id TEXT NOT NULL,
    event_type TEXT NOT NULL,
    attempt_count INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    finished_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT finished_deliveries_pkey PRIMARY KEY (id),
    CONSTRAINT finished_deliveries_state_final CHECK (state IN ('delivered', 'failed', 'cancelled'))
)
 PARTITION BY RANGE (id);
CREATE INDEX finished_deliveries_of_event ON finished_deliveries (event_id);
CREATE INDEX finished_deliveries_of_merchant ON finished_deliveries (merchant_id, id);
CREATE INDEX finished_deliveries_of_webhook ON finished_deliveries (webhook_id, id);
COMMENT ON TABLE finished_deliveries IS 'Deliveries in a final state; append-only';
COMMENT ON COLUMN finished_deliveries.state IS 'delivered, failed or cancelled';

CREATE TABLE attempts (
    delivery_id UUID NOT NULL,
    number INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    status_code INTEGER,
    detail TEXT NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    duration_us INTEGER NOT NULL,
    CONSTRAINT attempts_pkey PRIMARY KEY (delivery_id, number),
    CONSTRAINT attempts_number_counted CHECK (number >= 1),
    CONSTRAINT attempts_outcome_known CHECK (outcome IN ('succeeded', 'http_error', 'timeout', 'dns_error', 'connection_error', 'tls_error', 'protocol_error', 'refused', 'internal_error'))
)
 PARTITION BY RANGE (delivery_id);
COMMENT ON TABLE attempts IS 'HTTP requests made for deliveries; append-only';
COMMENT ON COLUMN attempts.number IS '1 for the first';
COMMENT ON COLUMN attempts.status_code IS 'HTTP status, when there was an answer';
COMMENT ON COLUMN attempts.detail IS 'The outcome in words, for people';
COMMENT ON COLUMN attempts.duration_us IS 'To the status line or the failure';

CREATE TABLE audit_entries (
    id UUID NOT NULL,
    actor TEXT NOT NULL,
    merchant_id TEXT,
    action TEXT NOT NULL,
    resource TEXT NOT NULL,
    result TEXT NOT NULL,
    changed_fields TEXT[] DEFAULT '{}' NOT NULL,
    request_id TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT audit_entries_pkey PRIMARY KEY (id)
);
CREATE INDEX audit_entries_of_actor ON audit_entries (actor, id);
CREATE INDEX audit_entries_of_resource ON audit_entries (resource, id);
COMMENT ON TABLE audit_entries IS 'Who changed what; append-only';
COMMENT ON COLUMN audit_entries.actor IS 'The sub claim of the caller''s token';
COMMENT ON COLUMN audit_entries.merchant_id IS 'Whose resource; null: nobody''s';
COMMENT ON COLUMN audit_entries.action IS 'The RPC, such as UpdateWebhookConfig';
COMMENT ON COLUMN audit_entries.resource IS 'Id or name of what was changed';
COMMENT ON COLUMN audit_entries.result IS 'OK, or the reason of the refusal';
COMMENT ON COLUMN audit_entries.changed_fields IS 'Names only, never values';
COMMENT ON COLUMN audit_entries.request_id IS 'The same as in the log line of the RPC';
"""

# A default partition accepts rows of a day without a partition.
PARTITIONED = ("events", "finished_deliveries", "attempts")

EVENT_TYPES = {
    "payment.created": "A payment was started",
    "payment.succeeded": "A payment was completed",
    "payment.failed": "A payment was declined or could not be completed",
    "payment.cancelled": "A payment was cancelled before completion",
    "refund.created": "A refund was started",
    "refund.succeeded": "A refund reached the customer",
    "refund.failed": "A refund could not be completed",
    "dispute.opened": "A customer disputed a payment",
    "dispute.closed": "A dispute was decided",
    "payout.paid": "A payout reached the merchant's bank",
    "payout.failed": "A payout was returned",
}


def upgrade() -> None:
    op.execute(NEW_UUID7)
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
    for table in PARTITIONED:
        op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT")
    for name, description in EVENT_TYPES.items():
        quoted = description.replace("'", "''")
        op.execute(f"INSERT INTO event_types (name, description) VALUES ('{name}', '{quoted}')")


def downgrade() -> None:
    for table in (
        "audit_entries",
        "attempts",
        "finished_deliveries",
        "delivery_queue",
        "idempotency_keys",
        "events",
        "webhook_configs",
        "event_types",
    ):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION new_uuid7()")
