"""The tables, one per module. migrations/ builds them; a test holds the two together."""

from core.models.attempt import Attempt
from core.models.audit_entry import AuditEntry
from core.models.base import Base
from core.models.event import Event
from core.models.event_type import EventType
from core.models.finished_delivery import FinishedDelivery
from core.models.idempotency_key import IdempotencyKey
from core.models.queued_delivery import QueuedDelivery
from core.models.retention_run import RetentionRun
from core.models.webhook_config import WebhookConfig

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
