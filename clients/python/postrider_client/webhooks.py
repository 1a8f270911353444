"""For receivers: whether a request is Postrider's, unaltered and recent.

What is signed is `webhook-id "." timestamp "." body`: by HMAC-SHA256 with the secret's characters
as the key (`v1`), or by an Ed25519 key pair whose public half the receiver has (`v1a`). While a
secret is being rotated there are several signatures, and one that fits is enough.
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
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
    secret: str | Sequence[str],
    headers: Mapping[str, str],
    body: bytes,
    tolerance: float = 300.0,
    *,
    now: float | None = None,
) -> Webhook:
    """What arrived; WebhookRefused unless a signature of `X-Webhook-Signature` is ours and recent.

    `secret` is a secret in either spelling that CreateWebhookConfig returned, or a `whpk_` public
    key (which needs the extra `ed25519`), or several of them, of which one must fit. `body` is the
    bytes as they came in, `tolerance` the seconds our clocks may differ. Names of headers may be in
    any case. ValueError for a secret or key that could not verify anything.
    """
    given = {name.lower(): value for name, value in headers.items()}
    message_id = given.get("webhook-id", "")
    timestamp, signatures = _parse(given.get("x-webhook-signature", ""))
    if not message_id:
        raise WebhookRefused("there is no webhook-id header")
    # Servers may hand over bytes that are no text as lone surrogates; our ids have none.
    message = b"%b.%d.%b" % (message_id.encode(errors="replace"), timestamp, body)
    keys = [secret] if isinstance(secret, str) else list(secret)
    # All are compared, so that the time tells nothing of which one fits.
    fits = [_fits(key, message, signatures) for key in keys]
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


def _parse(header: str) -> tuple[int, list[tuple[str, bytes]]]:
    """The timestamp, and each signature with its version."""
    timestamps: list[str] = []
    signatures: list[tuple[str, bytes]] = []
    for part in header.split(","):
        name, _, value = part.strip().partition("=")
        if name == "t":
            timestamps.append(value)
        elif name in {"v1", "v1a"}:
            signatures.append((name, value.encode(errors="replace")))
    # Of two timestamps one would be checked and the other perhaps believed.
    if len(timestamps) != 1 or not _is_number(timestamps[0]):
        raise WebhookRefused("X-Webhook-Signature is missing or has no single timestamp")
    return int(timestamps[0]), signatures[:_SIGNATURES_MAX]


def _fits(key: str, message: bytes, signatures: Sequence[tuple[str, bytes]]) -> bool:
    # The key says the scheme and never the request: whoever has the public key could make an HMAC.
    if key.startswith("whpk_"):
        codes = [code for version, code in signatures if version == "v1a"]
        return _fits_public_key(key, message, codes)
    expected = hmac.new(_key(key), message, hashlib.sha256).hexdigest().encode()
    codes = [code for version, code in signatures if version == "v1"]
    return sum(hmac.compare_digest(expected, code) for code in codes) > 0


def _fits_public_key(key: str, message: bytes, codes: Sequence[bytes]) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415
            Ed25519PublicKey,
        )
    except ImportError as error:
        raise RuntimeError(
            "a whpk_ key needs the extra `ed25519`: install postrider-client[ed25519]"
        ) from error
    try:
        public_key = Ed25519PublicKey.from_public_bytes(_decode(key.removeprefix("whpk_")))
    except ValueError as error:
        raise ValueError("the whpk_ key is not 32 bytes of base64") from error
    for code in codes:
        try:
            public_key.verify(binascii.unhexlify(code), message)
        except (binascii.Error, InvalidSignature):
            continue
        return True
    return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12


def _key(secret: str) -> bytes:
    if not secret:
        raise ValueError("the secret is empty, and anybody can sign with that")
    if secret != secret.strip():
        raise ValueError(
            "the secret has white space around it, such as the newline at the end of a file"
        )
    if secret.startswith("whsk_"):
        raise ValueError("a whsk_ key signs; to verify, take the whpk_ key of the webhook config")
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return _decode(secret.removeprefix("whsec_"))
    except binascii.Error as error:
        raise ValueError("the whsec_ secret is not base64") from error


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
