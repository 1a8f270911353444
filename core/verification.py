"""Whether a request is ours, and why not (pure): the receivers' half of `core/signing`.

What our own receivers verify with: the demo, `postrider listen` and `postrider canary`. A request
says its signature in several headers; each is checked by itself, and all that are there must be
right. The wheel `postrider-client` stands alone and so has a verifier of its own; a test holds the
two to the same answers.
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from core.signing import ID_HEADER, SIGNATURE_HEADER

TOLERANCE_SECONDS = 300.0

_SIGNATURES_MAX = 10
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
_SECRET = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_SCHEMES = {"v1": "an HMAC secret (whsec_… or 64 hexadecimal digits)", "v1a": "a whpk_ public key"}


class Fault(StrEnum):
    """What is wrong with a signature header."""

    UNSIGNED = "unsigned"
    MALFORMED = "malformed"
    #: Signed in a way for which no key was given.
    SCHEME = "scheme"
    MISMATCH = "mismatch"
    TIMESTAMP = "timestamp"


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """What a receiver verifies with; `version` is of the only signatures it is asked about."""

    version: str
    _key: bytes = field(repr=False)

    def fits(self, message: bytes, code: bytes) -> bool:
        # The key says the scheme, never the request: a public key must not pass for a secret.
        if self.version == "v1":
            return hmac.compare_digest(hmac.digest(self._key, message, hashlib.sha256), code)
        try:
            Ed25519PublicKey.from_public_bytes(self._key).verify(code, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Check:
    """What one signature header came to; `key` counts from 0."""

    header: str
    key: int | None = None
    fault: Fault | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one request: valid when there is a signature header, and all that there are fit."""

    checks: tuple[Check, ...]

    @property
    def valid(self) -> bool:
        return self.trouble is None

    @property
    def trouble(self) -> Check | None:
        """The first header that is not right; None when the request is valid."""
        if not self.checks:
            missing = f"no {SIGNATURE_HEADER} or webhook-signature header: not from Postrider"
            return Check("", fault=Fault.UNSIGNED, detail=missing)
        return next((check for check in self.checks if check.fault), None)


@dataclass(frozen=True, slots=True)
class _Signed:
    """One signature header, taken apart; `codes` are versions and signatures."""

    header: str
    message_id: str
    timestamp: str
    codes: Sequence[tuple[str, bytes]]


def verifying_key(text: str) -> VerifyingKey:
    """A secret in either spelling, or a `whpk_` public key; ValueError says what else it is."""
    if text.startswith("whsk_"):
        raise ValueError("a whsk_ key signs; to verify, take the whpk_ key of the webhook config")
    if text.startswith("whpk_"):
        key = _decoded(text.removeprefix("whpk_"))
        if key is None or len(key) != 32:
            raise ValueError("a whpk_ key is 32 bytes of base64; copy the whole public_key")
        return VerifyingKey("v1a", key)
    if text.startswith("whsec_"):
        key = _decoded(text.removeprefix("whsec_"))
        if not key:
            raise ValueError("a whsec_ secret is base64; copy all of standard_webhooks_secret")
        return VerifyingKey("v1", key)
    if not _SECRET.fullmatch(text):
        raise ValueError("a secret is 64 hexadecimal digits or begins with whsec_ or whpk_")
    return VerifyingKey("v1", text.encode())


def verify(
    keys: Sequence[VerifyingKey],
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> Verdict:
    """Check every signature header against the keys, of which one must fit; `now` in Unix seconds.

    `body` is the bytes as they came in; names of headers may be in any case.
    """
    given = {name.lower(): value for name, value in headers.items()}
    return Verdict(
        tuple(_check(keys, signed, body, now, tolerance_seconds) for signed in _signed(given))
    )


def _signed(given: Mapping[str, str]) -> Iterator[_Signed]:
    """Ours first, then the triples of the Standard Webhooks, under any prefix."""
    message_id = given.get(ID_HEADER, "")
    own = SIGNATURE_HEADER.lower()
    if own in given:
        parts = [part.strip().partition("=")[::2] for part in given[own].split(",")]
        times = [value for name, value in parts if name == "t"]
        codes = [(name, _unhexed(value)) for name, value in parts if name in _SCHEMES]
        # Of two timestamps one would be checked and the other perhaps believed.
        yield _Signed(SIGNATURE_HEADER, message_id, times[0] if len(times) == 1 else "", codes)
    for header, value in given.items():
        prefix = header.removesuffix("-signature")
        names = f"{prefix}-id", f"{prefix}-timestamp"
        if header in {prefix, own}:
            continue
        if header == "webhook-signature" or all(name in given for name in names):
            parts = [part.partition(",")[::2] for part in value.split()]
            codes = [(name, _decoded(text) or b"") for name, text in parts if name in _SCHEMES]
            message_id, timestamp = (given.get(name, "") for name in names)
            yield _Signed(header, message_id, timestamp, codes)


def _check(
    keys: Sequence[VerifyingKey], signed: _Signed, body: bytes, now: float, tolerance: float
) -> Check:
    codes = signed.codes[:_SIGNATURES_MAX]
    key, fault = None, _unusable(keys, signed, codes)
    if fault is None:
        # Servers may hand over bytes that are no text as lone surrogates; our ids have none.
        head = b"%b.%d." % (signed.message_id.encode(errors="replace"), int(signed.timestamp))
        # All are compared, so that the time tells nothing of which one fits.
        fits = [_fits(key, head + body, codes) for key in keys]
        if any(fits):
            key, fault = fits.index(True), _untimely(now - int(signed.timestamp), tolerance)
        else:
            fault = Fault.MISMATCH, _explain_mismatch(keys, head, body, codes)
    return Check(signed.header, key, *fault) if fault else Check(signed.header, key)


def _unusable(
    keys: Sequence[VerifyingKey], signed: _Signed, codes: Sequence[tuple[str, bytes]]
) -> tuple[Fault, str] | None:
    if not signed.message_id:
        return Fault.MALFORMED, "its id header is missing, and is part of what is signed"
    if not _NUMBER.fullmatch(signed.timestamp):
        return Fault.MALFORMED, f"{signed.header} has no single timestamp in Unix seconds"
    if not codes:
        return Fault.MALFORMED, f"{signed.header} holds no v1 or v1a signature"
    if not {key.version for key in keys} & {version for version, _ in codes}:
        version = codes[0][0]
        return Fault.SCHEME, f"signed with {version}: give {_SCHEMES[version]} to verify it"
    return None


def _untimely(age: float, tolerance: float) -> tuple[Fault, str] | None:
    if abs(age) <= tolerance:
        return None
    when = f"old: signed {age:.0f} s ago" if age > 0 else f"new: {-age:.0f} s ahead of our clock"
    return Fault.TIMESTAMP, (
        f"the timestamp is too {when}, and {tolerance:g} s are allowed; an old request sent again, "
        "or a wrong clock"
    )


def _fits(key: VerifyingKey, message: bytes, codes: Sequence[tuple[str, bytes]]) -> bool:
    return sum(key.fits(message, code) for version, code in codes if version == key.version) > 0


def _explain_mismatch(
    keys: Sequence[VerifyingKey], head: bytes, body: bytes, codes: Sequence[tuple[str, bytes]]
) -> str:
    """Which of the two it is, where a usual alteration of the body explains it."""
    for how, original in _usual_originals(body):
        if any(_fits(key, head + original, codes) for key in keys):
            return f"the body was altered on the way: the signature fits it {how}"
    return (
        "the signature is not that of this body and secret: another webhook config's secret, one "
        "from before a rotation, or a body that was altered on the way"
    )


def _usual_originals(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Bodies that frameworks and proxies are known to turn into this one."""
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


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _unhexed(text: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except ValueError:
        return b""
