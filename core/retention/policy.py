"""The retention policy as points in database time: older data is removed."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from core.settings import RetentionSettings

#: Before all data, so that nothing is removed.
NO_LIMIT = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Deliveries count from their end, all else from its creation.

    Events have the limit of delivered deliveries.
    """

    delivered_before: datetime
    undelivered_before: datetime
    keys_before: datetime
    audit_before: datetime

    @classmethod
    def at(cls, now: datetime, settings: RetentionSettings) -> Self:
        def before(days: int) -> datetime:
            return now - timedelta(days=days) if days else NO_LIMIT

        return cls(
            before(settings.retention_delivered_days),
            before(settings.retention_undelivered_days),
            before(settings.retention_idempotency_days),
            before(settings.retention_audit_days),
        )
