"""Stage: the headers of one attempt, signed now, over the event's bytes as they are."""

from core.ids import format_id
from core.queue import LeasedDelivery
from core.signing import signature_headers

USER_AGENT = "Postrider/0.1"


def sign(delivery: LeasedDelivery, secret: str, timestamp: int) -> dict[str, str]:
    """All headers but Host and Content-Length; retries keep the id and get a new timestamp."""
    headers = request_headers(
        content_type=delivery.content_type,
        event_type=delivery.event_type,
        message_id=format_id("evt", delivery.event_id),
        secret=secret,
        timestamp=timestamp,
        body=delivery.payload,
    )
    headers["X-Webhook-Delivery"] = format_id("dlv", delivery.id)
    headers["X-Webhook-Attempt"] = str(delivery.attempt_count + 1)
    return headers


def request_headers(
    *,
    content_type: str,
    event_type: str,
    message_id: str,
    secret: str,
    timestamp: int,
    body: bytes,
) -> dict[str, str]:
    """What deliveries and pings have in common."""
    return {
        "Content-Type": content_type,
        "User-Agent": USER_AGENT,
        # An answer's body is read only to be thrown away: nothing to unpack, no bomb to go off.
        "Accept-Encoding": "identity",
        "X-Webhook-Event": event_type,
        **signature_headers(secret, message_id, timestamp, body),
    }
