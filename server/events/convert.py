"""Converts events between messages, drafts and rows."""

from datetime import UTC, datetime

from core.ids import format_id
from postrider.v1 import event_pb2
from server.events.rules import EventDraft
from server.events.store import EventRow, PublishedEvent
from server.rpc.times import fill_time


def event_draft(message: event_pb2.EventInput) -> EventDraft:
    match message.WhichOneof("body"):
        case "payload":
            payload: bytes | None = message.payload
        case "payload_text":
            payload = message.payload_text.encode()
        case _:
            payload = None
    return EventDraft(
        merchant_id=message.merchant_id,
        type=message.type,
        content_type=message.content_type,
        payload=payload,
        idempotency_key=message.idempotency_key,
        not_before=_not_before(message),
        ordering_key=message.ordering_key,
    )


def _not_before(message: event_pb2.EventInput) -> datetime | None:
    if not message.HasField("not_before"):
        return None
    try:
        return message.not_before.ToDatetime(UTC)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def event_message(event: PublishedEvent | EventRow) -> event_pb2.Event:
    message = event_pb2.Event()
    fill_event(message, event)
    return message


def fill_event(message: event_pb2.Event, event: PublishedEvent | EventRow) -> None:
    """Set the fields of an empty message. Creating and copying one would take twice as long."""
    message.id = format_id("evt", event.id)
    message.merchant_id = event.merchant_id
    message.type = event.type
    fill_time(message.create_time, event.created_at)
    message.delivery_count = event.delivery_count
    if event.not_before is not None:
        fill_time(message.not_before, event.not_before)
    if event.ordering_key:
        message.ordering_key = event.ordering_key
