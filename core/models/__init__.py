"""The tables, for SQLAlchemy. Start at deliveries. A test compares them with migrations/."""

from core.models.base import Base
from core.models.deliveries import Attempt, FinishedDelivery, QueuedDelivery
from core.models.events import Event, EventType, IdempotencyKey
from core.models.operations import AuditEntry, RetentionRun
from core.models.webhooks import WebhookConfig

__all__ = [
    "Attempt",
    "AuditEntry",
    "Base",
    "Event",
    "EventType",
    "FinishedDelivery",
    "IdempotencyKey",
    "QueuedDelivery",
    "RetentionRun",
    "WebhookConfig",
]
