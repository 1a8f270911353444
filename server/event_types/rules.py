"""Rules of event types: their names, fields and filters, and their protobuf messages."""

import re
from dataclasses import dataclass

import orjson

from core.errors import FieldViolation, InvalidArgument
from core.models import EventType
from postrider.v1 import webhook_config_pb2
from server.event_types.schema import PayloadSchema, SchemaRefused
from server.rpc.times import timestamp
from server.rpc.validation import description_violations

UPDATABLE_FIELDS = ("description", "json_schema", "enforce_schema", "example", "deprecated")

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_PREFIX = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*\.\*")
_NAME_LENGTH_MAX = 128
#: The default limit of a payload.
_EXAMPLE_BYTES_MAX = 256 * 1024


@dataclass(frozen=True, slots=True)
class EventTypeDraft:
    """An unchecked event type from an operator."""

    name: str
    description: str = ""
    json_schema: str = ""
    enforce_schema: bool = False
    example: str = ""
    deprecated: bool = False


def event_type_draft(message: webhook_config_pb2.EventType) -> EventTypeDraft:
    fields = {field: getattr(message, field) for field in UPDATABLE_FIELDS}
    return EventTypeDraft(message.name, **fields)


def event_type_message(row: EventType) -> webhook_config_pb2.EventType:
    fields = {field: getattr(row, field) for field in UPDATABLE_FIELDS}
    return webhook_config_pb2.EventType(
        name=row.name, create_time=timestamp(row.created_at), **fields
    )


def is_event_type_name(name: str) -> bool:
    """Whether the name can be registered: dotted, lower case, at most 128 characters."""
    return len(name) <= _NAME_LENGTH_MAX and _NAME.fullmatch(name) is not None


def is_event_type_prefix(text: str) -> bool:
    """Whether the text is a prefix filter: segments and a star, as in `payment.*`."""
    return len(text) <= _NAME_LENGTH_MAX and _PREFIX.fullmatch(text) is not None


def event_type_name(text: str) -> str:
    """Return the text. Raises ValueError if no event type can have this name."""
    if not is_event_type_name(text):
        raise ValueError("not the name of an event type")
    return text


def event_type_filter(text: str, field: str = "event_type") -> str | None:
    """Return the event type to filter by, or None for all. Raises InvalidArgument."""
    if text and not is_event_type_name(text):
        raise InvalidArgument.of(
            field,
            "is not the name of an event type, such as payment.succeeded",
            reason="EVENT_TYPE_NAME_INVALID",
        )
    return text or None


def unknown_event_type(field: str, name: str) -> FieldViolation:
    """Violation of a published event whose type is not registered."""
    return FieldViolation(
        field,
        f"{name[:128]!r} is not a registered event type; "
        "WebhookConfigService.ListEventTypes lists them",
        "EVENT_TYPE_UNKNOWN",
    )


def unknown_subscription(field: str, name: str) -> FieldViolation:
    """Violation of a webhook config that names neither a registered type nor a prefix."""
    return FieldViolation(
        field,
        f"{name[:128]!r} is neither a registered event type, as "
        "WebhookConfigService.ListEventTypes lists them, nor a prefix such as 'payment.*'",
        "EVENT_TYPE_UNKNOWN",
    )


def deprecated_event_type(field: str, name: str) -> FieldViolation:
    """Violation of a new subscription to a deprecated type."""
    return FieldViolation(
        field,
        f"{name!r} is deprecated and takes no new subscriptions; "
        "WebhookConfigService.ListEventTypes lists the other types",
        "EVENT_TYPE_DEPRECATED",
    )


def check_name(name: str) -> None:
    """Raise InvalidArgument unless a new event type may have this name."""
    if not is_event_type_name(name):
        raise InvalidArgument.of(
            "event_type.name",
            "must be words of a-z 0-9 _ joined by dots, such as payment.succeeded, at most 128 "
            "characters",
            reason="EVENT_TYPE_NAME_INVALID",
        )


def check_fields(draft: EventTypeDraft) -> None:
    """Raise InvalidArgument with every violation of the fields other than the name."""
    violations = description_violations("event_type.description", draft.description)
    schema = None
    if draft.json_schema:
        try:
            schema = PayloadSchema(draft.json_schema)
        except SchemaRefused as refused:
            violations.append(
                FieldViolation("event_type.json_schema", str(refused), "JSON_SCHEMA_INVALID")
            )
    elif draft.enforce_schema:
        violations.append(
            FieldViolation(
                "event_type.enforce_schema",
                "needs a schema to enforce: set json_schema as well",
                "JSON_SCHEMA_MISSING",
            )
        )
    if draft.example and (fault := _example_violation(draft.example, schema)):
        violations.append(FieldViolation("event_type.example", fault, "EXAMPLE_INVALID"))
    if violations:
        raise InvalidArgument(*violations)


def _example_violation(example: str, schema: PayloadSchema | None) -> str | None:
    if len(example.encode()) > _EXAMPLE_BYTES_MAX:
        return f"has more than {_EXAMPLE_BYTES_MAX} bytes"
    try:
        document = orjson.loads(example)
    except orjson.JSONDecodeError as error:
        return f"is not JSON: {error}"
    fault = schema.violation(document) if schema else None
    return f"does not match json_schema: {fault}" if fault else None
