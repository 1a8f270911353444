"""Stage: the headers of one attempt, signed now, over the event's bytes as they are."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from core.ids import format_id
from core.queue import LeasedDelivery
from core.signing import signature_headers
from core.tracing import TraceParent
from delivery.http.request import header_lines


def sign(
    delivery: LeasedDelivery,
    secrets: Sequence[str],
    timestamp: int,
    prefix: str = "",
    trace_parent: TraceParent | None = None,
) -> bytes:
    """The header lines of one attempt; retries keep the id and get a new timestamp.

    They follow the destination's own; only Content-Length is not among either. A `trace_parent` is
    not signed.
    """
    others = {
        "X-Webhook-Delivery": format_id("dlv", delivery.id),
        "X-Webhook-Attempt": str(delivery.attempt_count + 1),
    }
    if trace_parent is not None:
        others["traceparent"] = str(trace_parent)
    return request_headers(
        content_type=delivery.content_type,
        event_type=delivery.event_type,
        message_id=format_id("evt", delivery.event_id),
        secrets=secrets,
        timestamp=timestamp,
        prefix=prefix,
        body=delivery.payload,
        others=others,
    )


def request_headers(
    *,
    content_type: str,
    event_type: str,
    message_id: str,
    secrets: Sequence[str],
    timestamp: int,
    prefix: str,
    body: bytes,
    others: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """What deliveries and pings have in common, and `others` after it."""
    return header_lines(
        {
            "Content-Type": content_type,
            "X-Webhook-Event": event_type,
            **signature_headers(secrets, message_id, timestamp, body, prefix),
            **others,
        }
    )
