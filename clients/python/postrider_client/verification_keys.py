"""The keys that verify signatures: HMAC secrets and Ed25519 public keys."""

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_SECRET = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A secret or public key. It verifies only signatures of its `scheme`."""

    scheme: str
    _key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "VerificationKey":
        """Parse a secret in either spelling or a `whpk_` public key. Raises ValueError."""
        if not text or text != text.strip():
            raise ValueError(
                "the secret is empty or has white space around it, such as the newline of its file"
            )
        if text.startswith("whsk_"):
            raise ValueError("a whsk_ key signs: to verify, take the whpk_ key of the config")
        if text.startswith("whpk_"):
            key = from_base64(text.removeprefix("whpk_"))
            if len(key) != 32:
                raise ValueError("a whpk_ key is 32 bytes of base64: copy the whole public_key")
            return cls("v1a", key)
        if text.startswith("whsec_"):
            key = from_base64(text.removeprefix("whsec_"))
            if not key:
                raise ValueError(
                    "a whsec_ secret is base64: copy the whole standard_webhooks_secret"
                )
            return cls("v1", key)
        if not _SECRET.fullmatch(text):
            raise ValueError("a secret is 64 hexadecimal digits or begins with whsec_ or whpk_")
        return cls("v1", text.encode())

    def verifies(self, message: bytes, signatures: Sequence[tuple[str, bytes]]) -> bool:
        # The scheme comes from the key, not from the request: anybody could make an HMAC with a
        # public key.
        codes = [code for scheme, code in signatures if scheme == self.scheme]
        if self.scheme == "v1":
            expected = hmac.digest(self._key, message, hashlib.sha256)
            # Compares all of them, so that the time does not depend on which one is valid.
            return sum(hmac.compare_digest(expected, code) for code in codes) > 0
        return _verifies_ed25519(self._key, message, codes)


def from_base64(text: str) -> bytes:
    """Decode strict base64. Returns no bytes if it is invalid."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def _verifies_ed25519(key: bytes, message: bytes, codes: Sequence[bytes]) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415
            Ed25519PublicKey,
        )
    except ImportError as error:
        raise RuntimeError(
            "a whpk_ key needs the extra `ed25519`: install postrider-client[ed25519]"
        ) from error
    public_key = Ed25519PublicKey.from_public_bytes(key)
    for code in codes:
        try:
            public_key.verify(code, message)
        except InvalidSignature:
            continue
        return True
    return False
