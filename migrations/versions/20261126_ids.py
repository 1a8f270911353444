"""Delivery ids without randomness from the operating system.

Safe beside the previous release, which calls the same function. Locks: only on the function.
Existing ids stay.

Ids are not secret, because every read also checks the merchant. So PostgreSQL's own generator,
which each session seeds with strong randomness, is sufficient. A build without OpenSSL opened a
device for every id. That took most of the time of an id, and a fifth of an accepted event.
"""

from alembic import op

revision = "20261126_ids"
down_revision = "20261125_traces"
branch_labels = None
depends_on = None

# RFC 9562, 5.7: 48 bits of milliseconds, version, 12 random bits, variant (10), 62 random bits.
UPGRADE = """
CREATE OR REPLACE FUNCTION new_uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT encode(
        int8send(
            ((extract(epoch FROM clock_timestamp()) * 1000)::bigint << 16)
            | x'7000'::bigint
            | floor(random() * 4096)::bigint)
        || int8send(
            x'8000000000000000'::bigint
            | (floor(random() * 2147483648)::bigint << 31)
            | floor(random() * 2147483648)::bigint),
        'hex')::uuid
$$
"""

DOWNGRADE = """
CREATE OR REPLACE FUNCTION new_uuid7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
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


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
