"""The duration of the TLS handshake of an attempt, apart from the TCP connection.

Safe beside the previous release, whose attempts leave it empty. Locks: ACCESS EXCLUSIVE on attempts
and its partitions for a moment. No row is rewritten.
"""

from alembic import op

revision = "20261129_tls"
down_revision = "20261128_waiting"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE attempts ADD COLUMN tls_us INTEGER;
COMMENT ON COLUMN attempts.tls_us IS 'Of connect_us, TLS; null: as for dns_us, or it never began'
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute("ALTER TABLE attempts DROP COLUMN tls_us")
