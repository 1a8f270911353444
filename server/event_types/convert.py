"""Event types."""

from core.errors import InvalidArgument
from core.models import EventType
from postrider.v1 import webhook_config_pb2
from server.event_types.cache import is_event_type_name
from server.event_types.register import EventTypeDraft
from server.rpc.times import timestamp


def event_type_message(row: EventType) -> webhook_config_pb2.EventType:
    return webhook_config_pb2.EventType(
        name=row.name,
        description=row.description,
        create_time=timestamp(row.created_at),
        json_schema=row.json_schema,
        enforce_schema=row.enforce_schema,
        example=row.example,
        deprecated=row.deprecated,
    )


def event_type_draft(message: webhook_config_pb2.EventType) -> EventTypeDraft:
    return EventTypeDraft(
        name=message.name,
        description=message.description,
        json_schema=message.json_schema,
        enforce_schema=message.enforce_schema,
        example=message.example,
        deprecated=message.deprecated,
    )


def event_type_filter(text: str, field: str = "event_type") -> str | None:
    """The event type to filter by; None for all."""
    if text and not is_event_type_name(text):
        raise InvalidArgument.of(
            field,
            "is not the name of an event type, such as payment.succeeded",
            reason="EVENT_TYPE_NAME_INVALID",
        )
    return text or None
