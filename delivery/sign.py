"""Stage: builds and signs the headers of one attempt. The payload's bytes are sent unchanged."""

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
    """Return the header lines of one attempt. A retry keeps the id and gets a new timestamp.

    They follow the headers of the destination. Content-Length is in neither. `trace_parent` is not
    signed.
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
    """Return the header lines that deliveries and pings share, followed by `others`."""
    return header_lines(
        {
            "Content-Type": content_type,
            "X-Webhook-Event": event_type,
            **signature_headers(secrets, message_id, timestamp, body, prefix),
            **others,
        }
    )
