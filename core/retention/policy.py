"""Terms: before which moment what may go, in the database's time."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

from core.settings import RetentionSettings


@dataclass(frozen=True, slots=True)
class DeliveryTerms:
    """Deliveries go by their end; events, by when they came, with the delivered ones.

    `undelivered_before` is None when what failed is kept for ever.
    """

    delivered_before: datetime
    undelivered_before: datetime | None


@dataclass(frozen=True, slots=True)
class Terms:
    """None: it is kept for ever."""

    deliveries: DeliveryTerms | None
    keys_before: datetime | None
    audit_before: datetime | None

    @classmethod
    def at(cls, now: datetime, settings: RetentionSettings) -> Self:
        def before(days: int) -> datetime | None:
            return now - timedelta(days=days) if days else None

        delivered = before(settings.retention_delivered_days)
        undelivered = before(settings.retention_undelivered_days)
        return cls(
            DeliveryTerms(delivered, undelivered) if delivered else None,
            before(settings.retention_idempotency_days),
            before(settings.retention_audit_days),
        )
