"""Refused calls in the audit log, and the address and user agent of every caller.

Safe beside the previous release, which leaves the new columns empty. Locks: ACCESS EXCLUSIVE on
audit_entries for a moment. No row is rewritten, because the defaults are constants.
"""

from alembic import op

revision = "20261123_refusals"
down_revision = "20261123_ordering"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE audit_entries ADD COLUMN caller_address TEXT DEFAULT '' NOT NULL;
ALTER TABLE audit_entries ADD COLUMN user_agent TEXT DEFAULT '' NOT NULL;
COMMENT ON TABLE audit_entries IS 'Who changed what, and who was refused what; append-only';
COMMENT ON COLUMN audit_entries.actor IS 'The sub claim of the caller''s token, or the name in its certificate';
COMMENT ON COLUMN audit_entries.merchant_id IS 'Whose resource, of a refusal whose caller; null: nobody''s';
COMMENT ON COLUMN audit_entries.resource IS 'Id or name of what was changed, or was to be';
COMMENT ON COLUMN audit_entries.caller_address IS 'Host and port of the caller, or of the gateway before it';
COMMENT ON COLUMN audit_entries.user_agent IS 'What the caller''s library calls itself'
"""

DOWNGRADE = """
COMMENT ON TABLE audit_entries IS 'Who changed what; append-only';
COMMENT ON COLUMN audit_entries.actor IS 'The sub claim of the caller''s token';
COMMENT ON COLUMN audit_entries.merchant_id IS 'Whose resource; null: nobody''s';
COMMENT ON COLUMN audit_entries.resource IS 'Id or name of what was changed';
ALTER TABLE audit_entries DROP COLUMN user_agent;
ALTER TABLE audit_entries DROP COLUMN caller_address
"""


def upgrade() -> None:
    for statement in UPGRADE.split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWNGRADE.split(";\n"):
        op.execute(statement)
