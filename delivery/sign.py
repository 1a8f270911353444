"""Stage: the headers of one attempt, signed now, over the event's bytes as they are."""

from collections.abc import Mapping, Sequence

from core.ids import format_id
from core.queue import LeasedDelivery
from core.signing import signature_headers

USER_AGENT = "Postrider/0.1"


def sign(
    delivery: LeasedDelivery, secrets: Sequence[str], headers: Mapping[str, str], timestamp: int
) -> dict[str, str]:
    """All headers but Host and Content-Length; retries keep the id and get a new timestamp."""
    ours = request_headers(
        content_type=delivery.content_type,
        event_type=delivery.event_type,
        message_id=format_id("evt", delivery.event_id),
        secrets=secrets,
        custom=headers,
        timestamp=timestamp,
        body=delivery.payload,
    )
    ours["X-Webhook-Delivery"] = format_id("dlv", delivery.id)
    ours["X-Webhook-Attempt"] = str(delivery.attempt_count + 1)
    return ours


def request_headers(
    *,
    content_type: str,
    event_type: str,
    message_id: str,
    secrets: Sequence[str],
    custom: Mapping[str, str],
    timestamp: int,
    body: bytes,
) -> dict[str, str]:
    """What deliveries and pings have in common; `custom` holds none of our names."""
    return {
        **custom,
        "Content-Type": content_type,
        "User-Agent": USER_AGENT,
        # An answer's body is read only to be thrown away: nothing to unpack, no bomb to go off.
        "Accept-Encoding": "identity",
        "X-Webhook-Event": event_type,
        **signature_headers(secrets, message_id, timestamp, body),
    }
