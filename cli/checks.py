"""What both processes check when they start, beside the schema."""

import structlog

from core.config import EgressSettings
from core.db import Pool
from core.errors import ConfigurationError
from core.keyring import KeyRing

log = structlog.get_logger()


async def require_encryption_keys(pool: Pool, keyring: KeyRing) -> None:
    """ConfigurationError when secrets in the database need a key that the ring lacks."""
    rows = await pool.fetch(
        "SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL UNION "
        "SELECT previous_secret_key_id FROM webhook_configs "
        "WHERE previous_secret_expires_at > now()"
    )
    missing = keyring.missing({row["key_id"] for row in rows})
    if missing:
        raise ConfigurationError(
            f"secrets in the database are encrypted with the key {', '.join(sorted(missing))}, "
            "which is not configured: add it to WEBHOOK_ENCRYPTION_KEYS, or to its file"
        )


def warn_of_allowed_cidrs(settings: EgressSettings) -> None:
    """Say it at every start: with an allow-list, merchants may reach inside."""
    if settings.allowed_cidrs:
        log.warning(
            "private_addresses_allowed",
            setting="WEBHOOK_ALLOWED_CIDRS",
            cidrs=[str(network) for network in settings.allowed_cidrs],
        )
