"""For receivers: whether a request is Postrider's, unaltered and recent.

What is signed is `webhook-id "." timestamp "." body` with the secret's characters as the key; while
a secret is being rotated there are several signatures, and one that fits is enough.
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass

from postrider_client.errors import WebhookRefused

_SIGNATURES_MAX = 10


@dataclass(frozen=True, slots=True)
class Webhook:
    """A verified request; `id` is the same for every retry, so use it to drop duplicates."""

    id: str
    timestamp: int
    event_type: str
    delivery_id: str
    attempt: int


def verify_webhook(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    tolerance: float = 300.0,
    *,
    now: float | None = None,
) -> Webhook:
    """What arrived; WebhookRefused unless one `v1` of `X-Webhook-Signature` is ours and recent.

    `secret` is either spelling that CreateWebhookConfig returned, `body` the bytes as they came in,
    `tolerance` the seconds our clocks may differ. Names of headers may be in any case.
    """
    given = {name.lower(): value for name, value in headers.items()}
    message_id = given.get("webhook-id", "")
    timestamp, signatures = _parse(given.get("x-webhook-signature", ""))
    if not message_id:
        raise WebhookRefused("there is no webhook-id header")
    # Servers may hand over bytes that are no text as lone surrogates; our ids have none.
    message = b"%b.%d.%b" % (message_id.encode(errors="replace"), timestamp, body)
    expected = hmac.new(_key(secret), message, hashlib.sha256).hexdigest().encode()
    # All are compared, so that the time tells nothing of which one fits.
    fits = [hmac.compare_digest(expected, s.encode(errors="replace")) for s in signatures]
    if not any(fits):
        raise WebhookRefused("the signature is not that of this body and secret")
    if abs((time.time() if now is None else now) - timestamp) > tolerance:
        raise WebhookRefused(
            f"the timestamp is more than {tolerance:g} s off: an old request, or a wrong clock"
        )
    attempt = given.get("x-webhook-attempt", "")
    return Webhook(
        id=message_id,
        timestamp=timestamp,
        event_type=given.get("x-webhook-event", ""),
        delivery_id=given.get("x-webhook-delivery", ""),
        attempt=int(attempt) if _is_number(attempt) else 1,
    )


def _parse(header: str) -> tuple[int, list[str]]:
    timestamps, signatures = [], []
    for part in header.split(","):
        name, _, value = part.strip().partition("=")
        if name == "t":
            timestamps.append(value)
        elif name == "v1":
            signatures.append(value)
    # Of two timestamps one would be checked and the other perhaps believed.
    if len(timestamps) != 1 or not _is_number(timestamps[0]):
        raise WebhookRefused("X-Webhook-Signature is missing or has no single timestamp")
    return int(timestamps[0]), signatures[:_SIGNATURES_MAX]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12


def _key(secret: str) -> bytes:
    if not secret:
        raise ValueError("the secret is empty, and anybody can sign with that")
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise ValueError("the whsec_ secret is not base64") from error
