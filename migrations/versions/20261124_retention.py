"""Partitions by day for events and history, a partition for kept rows, and the audit log by merchant.

Each of the three tables becomes a list of partitions by `kept`: true for rows that outlive their
day, false for days, null for rows from before this migration. Those rows stay in the partition
`_before`. Retention removes them row by row and then drops it. A new database has no `_before`.

Safe beside the previous release: it writes the default of `kept` and reads all partitions. The old
rows are read once, without blocking writes. Locks: ACCESS EXCLUSIVE for a moment, independent of
the size. An interrupted run can be repeated.

Each partition has PRIMARY KEY (id). The whole table has no primary key, because it would have to
include `kept` and so would allow an id twice.
"""

from alembic import op

revision = "20261124_retention"
down_revision = "20261123_signatures"
branch_labels = None
depends_on = None

KEYS = {"events": "id", "finished_deliveries": "id", "attempts": "delivery_id"}
PRIMARY_KEYS = {"events": "id", "finished_deliveries": "id", "attempts": "delivery_id, number"}

INDEXES = {
    "events": {"events_of_merchant": "(merchant_id, id)"},
    "finished_deliveries": {
        "finished_deliveries_of_event": "(event_id)",
        "finished_deliveries_of_merchant": "(merchant_id, id)",
        "finished_deliveries_of_type": "(merchant_id, event_type, id)",
        "finished_deliveries_of_webhook": "(webhook_id, id)",
        "finished_deliveries_undelivered": "(merchant_id, id) WHERE state <> 'delivered'",
    },
    "attempts": {"attempts_recorded": "(recorded_xid)"},
}

COMMENTS = {
    "events": "Published events; append-only",
    "finished_deliveries": "Deliveries in a final state; append-only",
    "attempts": "HTTP requests made for deliveries; append-only",
}

MARK = """
ALTER TABLE {table} ADD COLUMN IF NOT EXISTS kept BOOLEAN;
COMMENT ON COLUMN {table}.kept IS 'Whether it outlives its day; null: from before there were days';
ALTER TABLE {table}_default DROP CONSTRAINT IF EXISTS {table}_unmarked;
ALTER TABLE {table}_default ADD CONSTRAINT {table}_unmarked CHECK (kept IS NULL) NOT VALID
"""

# Because of the constraint, ATTACH reads no rows.
DIVIDE = """
ALTER TABLE {table} DETACH PARTITION {table}_default;
ALTER TABLE {table}_default RENAME TO {table}_before;
ALTER TABLE {table} RENAME TO {table}_undivided;
CREATE TABLE {table} (LIKE {table}_undivided INCLUDING CONSTRAINTS INCLUDING DEFAULTS INCLUDING COMMENTS)
    PARTITION BY LIST (kept);
DROP TABLE {table}_undivided;
COMMENT ON TABLE {table} IS '{comment}';
ALTER TABLE {table} ALTER COLUMN kept SET DEFAULT false;
{indexes};
CREATE TABLE {table}_by_day PARTITION OF {table} FOR VALUES IN (false) PARTITION BY RANGE ({key});
CREATE TABLE {table}_kept PARTITION OF {table} FOR VALUES IN (true);
ALTER TABLE {table}_kept ADD PRIMARY KEY ({primary_key});
ALTER TABLE {table} ATTACH PARTITION {table}_before FOR VALUES IN (NULL);
ALTER TABLE {table}_before DROP CONSTRAINT {table}_unmarked;
CREATE TABLE {table}_default PARTITION OF {table}_by_day DEFAULT;
ALTER TABLE {table}_default ADD PRIMARY KEY ({primary_key})
"""

# Frees the index names for the new default partition.
RENAME_INDEXES = """
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT indexname FROM pg_indexes
        WHERE schemaname = current_schema() AND tablename = '{table}_default'
    LOOP
        EXECUTE format('ALTER INDEX %I RENAME TO %I', name, replace(name, '_default', '_before'));
    END LOOP;
END $$
"""

DROP_EMPTY = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM {table}_before) THEN DROP TABLE {table}_before; END IF;
END $$
"""

RUNS = """
CREATE TABLE retention_runs (
    id UUID NOT NULL,
    began_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    completed_at TIMESTAMP WITH TIME ZONE,
    removed_before TIMESTAMP WITH TIME ZONE,
    actor TEXT NOT NULL,
    done JSONB DEFAULT '{}' NOT NULL,
    CONSTRAINT retention_runs_pkey PRIMARY KEY (id)
);
CREATE INDEX retention_runs_completed ON retention_runs (completed_at) WHERE completed_at IS NOT NULL;
CREATE INDEX retention_runs_removed ON retention_runs (removed_before) WHERE removed_before IS NOT NULL;
CREATE INDEX audit_entries_of_merchant ON audit_entries (merchant_id, id) WHERE merchant_id IS NOT NULL;
COMMENT ON TABLE retention_runs IS 'When retention ran, and what it did; the last 90 days';
COMMENT ON COLUMN retention_runs.completed_at IS 'Null: under way, or broken off';
COMMENT ON COLUMN retention_runs.removed_before IS 'Deliveries finished before may be gone; null: none are';
COMMENT ON COLUMN retention_runs.actor IS 'engine, or who ran the command';
COMMENT ON COLUMN retention_runs.done IS 'Counts of what was made, moved and removed'
"""

# Copies all rows back into one partition, so the time grows with their number.
JOIN = """
ALTER TABLE {table} RENAME TO {table}_parts;
ALTER TABLE {table}_default RENAME TO {table}_parts_default;
{renames};
CREATE TABLE {table} (LIKE {table}_parts INCLUDING CONSTRAINTS INCLUDING DEFAULTS INCLUDING COMMENTS)
    PARTITION BY RANGE ({key});
COMMENT ON TABLE {table} IS '{comment}';
ALTER TABLE {table} DROP COLUMN kept;
CREATE TABLE {table}_default PARTITION OF {table} DEFAULT
"""

COPY = """
DO $$ DECLARE columns text; BEGIN
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns FROM pg_attribute
    WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped;
    EXECUTE format('INSERT INTO {table} (%1$s) SELECT %1$s FROM {table}_parts', columns);
END $$
"""

JOINED = """
DROP TABLE {table}_parts;
ALTER TABLE {table} ADD CONSTRAINT {table}_pkey PRIMARY KEY ({primary_key});
{indexes}
"""


def upgrade() -> None:
    for table in KEYS:
        _run(MARK, table)
    with op.get_context().autocommit_block():
        for table in KEYS:
            op.execute(f"ALTER TABLE {table}_default VALIDATE CONSTRAINT {table}_unmarked")
    for table in KEYS:
        op.execute(RENAME_INDEXES.format(table=table))
        _run(DIVIDE, table)
        op.execute(DROP_EMPTY.format(table=table))
    _run(RUNS)


def downgrade() -> None:
    op.execute("DROP INDEX audit_entries_of_merchant")
    op.execute("DROP TABLE retention_runs")
    for table in KEYS:
        _run(JOIN, table)
        op.execute(COPY.format(table=table))
        _run(JOINED, table)


def _run(statements: str, table: str = "") -> None:
    filled = (
        statements.format(
            table=table,
            key=KEYS[table],
            primary_key=PRIMARY_KEYS[table],
            comment=COMMENTS[table],
            indexes=";\n".join(
                f"CREATE INDEX {name} ON {table} {columns}"
                for name, columns in INDEXES[table].items()
            ),
            renames=";\n".join(
                f"ALTER INDEX {name} RENAME TO {name}_of_parts" for name in INDEXES[table]
            ),
        )
        if table
        else statements
    )
    for statement in filled.split(";\n"):
        op.execute(statement)
