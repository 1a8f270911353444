"""Signatures of webhooks (pure): one HMAC-SHA256, told in two notations.

The key is the secret's 64 ASCII characters. What is signed is `webhook-id "." timestamp "." body`
(Standard Webhooks 1.0.0), the body being exactly the bytes that are sent. `webhook-signature` holds
the code in base64 as `v1,…`; `X-Webhook-Signature` holds the same code in hexadecimal, in the
`t=…,v1=…` form merchants know from other senders. While a secret is changed over, both headers hold
a signature for each of the two, the new one first.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
STANDARD_SIGNATURE_HEADER = "webhook-signature"
SIGNATURE_HEADER = "X-Webhook-Signature"


def new_secret() -> str:
    """A fresh signing secret: 32 random bytes as 64 hexadecimal digits."""
    return secrets.token_hex(32)


def standard_secret(secret: str) -> str:
    """The secret as Standard Webhooks libraries take it: `whsec_` and base64 of the HMAC key."""
    return "whsec_" + base64.b64encode(secret.encode()).decode()


def signature_headers(
    secrets: Sequence[str], message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The four headers that identify and sign one request; timestamp in Unix seconds.

    One signature for each secret, in their order: the present one first, then a retired one.
    """
    codes = [_code(secret, message_id, timestamp, body) for secret in secrets]
    return {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(timestamp),
        STANDARD_SIGNATURE_HEADER: " ".join(
            "v1," + base64.b64encode(code).decode() for code in codes
        ),
        SIGNATURE_HEADER: ",".join([f"t={timestamp}", *(f"v1={code.hex()}" for code in codes)]),
    }


def verify(
    secret: str,
    message_id: str,
    body: bytes,
    signature: str,
    *,
    now: float,
    tolerance_seconds: float = 300,
) -> bool:
    """Whether `signature`, an `X-Webhook-Signature` value, is ours for this body and recent.

    Any of its signatures will do: while a secret is changed over there are two.
    """
    parts = [part.partition("=")[::2] for part in signature.split(",")]
    timestamp = next((value for key, value in parts if key == "t"), "")
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        return False
    expected = _code(secret, message_id, int(timestamp), body).hex().encode()
    received = [value.encode() for key, value in parts if key == "v1"]
    # All of them, so that the time it takes says nothing.
    genuine = sum(hmac.compare_digest(expected, code) for code in received) > 0
    return genuine and abs(now - int(timestamp)) <= tolerance_seconds


def _code(secret: str, message_id: str, timestamp: int, body: bytes) -> bytes:
    message = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return hmac.digest(secret.encode(), message, hashlib.sha256)
