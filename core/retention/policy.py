"""The retention policy as points in database time: older data is removed."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from core.settings import RetentionSettings


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """Deliveries count from their end. Events count from their creation, as delivered deliveries.

    `undelivered_before` is None if failed and cancelled deliveries are kept without limit.
    """

    delivered_before: datetime
    undelivered_before: datetime | None


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """None stands for no limit."""

    deliveries: DeliveryPolicy | None
    keys_before: datetime | None
    audit_before: datetime | None

    @classmethod
    def at(cls, now: datetime, settings: RetentionSettings) -> Self:
        def before(days: int) -> datetime | None:
            return now - timedelta(days=days) if days else None

        delivered = before(settings.retention_delivered_days)
        undelivered = before(settings.retention_undelivered_days)
        return cls(
            DeliveryPolicy(delivered, undelivered) if delivered else None,
            before(settings.retention_idempotency_days),
            before(settings.retention_audit_days),
        )
