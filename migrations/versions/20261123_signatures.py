"""Key pairs that sign webhooks, and a header prefix of a config.

Safe beside the previous release: its new configs sign by HMAC and have no prefix. Its engines
ignore both, so replace them before a merchant selects a key pair. Locks: ACCESS EXCLUSIVE on
webhook_configs for a moment. No row is rewritten.
"""

from alembic import op

revision = "20261123_signatures"
down_revision = "20261123_refusals"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE webhook_configs
    ADD COLUMN public_key TEXT,
    ADD COLUMN previous_public_key TEXT,
    ADD COLUMN header_prefix TEXT DEFAULT '' NOT NULL;
COMMENT ON COLUMN webhook_configs.public_key IS 'Of the secret when that is a key pair; null: it signs by HMAC';
COMMENT ON COLUMN webhook_configs.previous_public_key IS 'The same of the secret before';
COMMENT ON COLUMN webhook_configs.header_prefix IS 'Id, timestamp and signature are sent under it, too; empty: not'
"""

DOWNGRADE = """
ALTER TABLE webhook_configs
    DROP COLUMN public_key, DROP COLUMN previous_public_key, DROP COLUMN header_prefix
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute(DOWNGRADE)
