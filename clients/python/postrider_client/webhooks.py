"""Verify that a request was sent by Postrider, unaltered and recently.

Postrider signs `webhook-id "." timestamp "." body`: with HMAC-SHA256 and the secret's characters as
the key (`v1`), or with an Ed25519 key pair whose public key the receiver has (`v1a`). During a
rotation a header holds several signatures, and one valid signature is enough.
"""

import binascii
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from postrider_client.errors import WebhookRefused
from postrider_client.verification_keys import VerificationKey, from_base64

TOLERANCE_SECONDS = 300.0

_SIGNATURE_HEADER = "X-Webhook-Signature"
_SIGNATURES_MAX = 10
_TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)
_SCHEMES = {"v1": "an HMAC secret (whsec_… or 64 hexadecimal digits)", "v1a": "a whpk_ public key"}


@dataclass(frozen=True, slots=True)
class Webhook:
    """A verified request. All retries have the same `id`: use it to drop duplicates."""

    id: str
    timestamp: int
    event_type: str
    delivery_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class HeaderCheck:
    """The check of one signature header: the index of the valid key, or the error."""

    header: str
    key: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The checks of all signature headers of a request."""

    checks: tuple[HeaderCheck, ...]

    @property
    def failed(self) -> HeaderCheck | None:
        """The first header with an error. None if the request is valid."""
        if not self.checks:
            missing = f"no {_SIGNATURE_HEADER} or webhook-signature header: not from Postrider"
            return HeaderCheck("", error=missing)
        return next((check for check in self.checks if check.error), None)

    @property
    def valid(self) -> bool:
        return self.failed is None


@dataclass(frozen=True, slots=True)
class _SignedHeader:
    header: str
    message_id: str
    timestamp: str
    signatures: Sequence[tuple[str, bytes]]


def verify_webhook(
    secret: str | Sequence[str],
    headers: Mapping[str, str],
    body: bytes,
    tolerance: float = TOLERANCE_SECONDS,
    *,
    now: float | None = None,
) -> Webhook:
    """Verify the `X-Webhook-Signature` header of a request.

    `secret` is a secret in either spelling that CreateWebhookConfig returned, a `whpk_` public key
    (needs the extra `ed25519`), or a sequence of them, of which one must match. `body` is the
    unparsed request body. `tolerance` is the accepted age in seconds. Header names may have any
    case.

    Raises WebhookRefused if the signature is missing, invalid or too old, and ValueError for a
    secret or key that cannot verify anything.
    """
    keys = [
        VerificationKey.parse(text) for text in ([secret] if isinstance(secret, str) else secret)
    ]
    given = {name.lower(): value for name, value in headers.items()}
    signed = _own_header(given)
    check = _check(keys, signed, body, time.time() if now is None else now, tolerance)
    if check.error:
        raise WebhookRefused(check.error)
    attempt = given.get("x-webhook-attempt", "")
    return Webhook(
        id=signed.message_id,
        timestamp=int(signed.timestamp),
        event_type=given.get("x-webhook-event", ""),
        delivery_id=given.get("x-webhook-delivery", ""),
        attempt=int(attempt) if _TIMESTAMP.fullmatch(attempt) else 1,
    )


def inspect_webhook(
    keys: Sequence[VerificationKey],
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float,
    tolerance: float = TOLERANCE_SECONDS,
) -> Inspection:
    """Check every signature header of a request, for receivers that report why one is invalid.

    The Standard Webhooks headers are checked under any prefix. A body that was altered in a usual
    way is recognized; this costs a few signatures more.
    """
    given = {name.lower(): value for name, value in headers.items()}
    signed_headers = list(_standard_headers(given))
    if _SIGNATURE_HEADER.lower() in given:
        signed_headers.insert(0, _own_header(given))
    return Inspection(
        tuple(_check(keys, h, body, now, tolerance, explain=True) for h in signed_headers)
    )


def _own_header(given: Mapping[str, str]) -> _SignedHeader:
    value = given.get(_SIGNATURE_HEADER.lower(), "")
    parts = [part.strip().partition("=")[::2] for part in value.split(",")]
    timestamps = [text for name, text in parts if name == "t"]
    # With two timestamps a receiver could check one and use the other.
    timestamp = timestamps[0] if len(timestamps) == 1 else ""
    signatures = [(name, _from_hex(text)) for name, text in parts if name in _SCHEMES]
    return _SignedHeader(_SIGNATURE_HEADER, given.get("webhook-id", ""), timestamp, signatures)


def _standard_headers(given: Mapping[str, str]) -> Iterator[_SignedHeader]:
    for header, value in given.items():
        prefix = header.removesuffix("-signature")
        names = f"{prefix}-id", f"{prefix}-timestamp"
        if header in {prefix, _SIGNATURE_HEADER.lower()}:
            continue
        if header == "webhook-signature" or all(name in given for name in names):
            parts = [part.partition(",")[::2] for part in value.split()]
            signatures = [(name, from_base64(text)) for name, text in parts if name in _SCHEMES]
            message_id, timestamp = (given.get(name, "") for name in names)
            yield _SignedHeader(header, message_id, timestamp, signatures)


def _check(
    keys: Sequence[VerificationKey],
    signed: _SignedHeader,
    body: bytes,
    now: float,
    tolerance: float,
    *,
    explain: bool = False,
) -> HeaderCheck:
    signatures = signed.signatures[:_SIGNATURES_MAX]
    schemes = [scheme for scheme, _ in signatures]
    if error := _malformed(signed, schemes):
        return HeaderCheck(signed.header, error=error)
    if not {key.scheme for key in keys} & set(schemes):
        error = f"the signature is {schemes[0]}: verify it with {_SCHEMES[schemes[0]]}"
        return HeaderCheck(signed.header, error=error)
    # Some servers decode invalid bytes to lone surrogates. Postrider's ids hold none.
    head = b"%b.%d." % (signed.message_id.encode(errors="replace"), int(signed.timestamp))
    # Tries all keys, so that the time does not depend on which one is valid.
    valid = [key.verifies(head + body, signatures) for key in keys]
    if any(valid):
        error = _untimely(now - int(signed.timestamp), tolerance)
        return HeaderCheck(signed.header, valid.index(True), error)
    for alteration, original in _usual_originals(body) if explain else ():
        if any(key.verifies(head + original, signatures) for key in keys):
            error = f"the body was altered on the way: the signature is valid {alteration}"
            return HeaderCheck(signed.header, error=error)
    error = (
        "the signature does not match this body and secret: another webhook config's secret, one "
        "from before a rotation, or an altered body"
    )
    return HeaderCheck(signed.header, error=error)


def _malformed(signed: _SignedHeader, schemes: Sequence[str]) -> str:
    if not signed.message_id:
        return "the id header is missing, and the signature covers it"
    if not _TIMESTAMP.fullmatch(signed.timestamp):
        return f"{signed.header} is missing or has no single timestamp in Unix seconds"
    return "" if schemes else f"{signed.header} has no v1 or v1a signature"


def _untimely(age: float, tolerance: float) -> str:
    if abs(age) <= tolerance:
        return ""
    when = f"old: signed {age:.0f} s ago" if age > 0 else f"new: {-age:.0f} s ahead of our clock"
    return (
        f"the timestamp is too {when}, and {tolerance:g} s are allowed: a replayed request or a "
        "wrong clock"
    )


def _usual_originals(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield bodies that frameworks and proxies are known to turn into this one."""
    yield "without the white space around it", body.strip()
    yield "with a line break at its end", body + b"\n"
    try:
        value = json.loads(body)
        yield "as compact JSON", json.dumps(value, separators=(",", ":")).encode()
        compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        yield "as compact JSON in UTF-8", compact.encode()
        yield "as JSON with spaces", json.dumps(value).encode()
    except (ValueError, RecursionError):
        return


def _from_hex(text: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except ValueError:
        return b""
