"""A key pair and tokens for development, so that one machine needs no identity provider.

The pair is created once. An existing private key is never replaced.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from cli.atomic_file import create_file, replace_file
from core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class DevelopmentKey:
    """The files of a pair. The public one is for WEBHOOK_JWT_PUBLIC_KEY_FILE."""

    private_key_file: Path
    public_key_file: Path


def ensure_development_key(directory: Path) -> DevelopmentKey:
    """Create the pair unless it exists. Safe in several processes at once."""
    pair = DevelopmentKey(directory / "private.pem", directory / "public.pem")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not pair.private_key_file.exists():
            create_file(pair.private_key_file, _private_pem(Ed25519PrivateKey.generate()))
        public_pem = _public_pem(_read_private_key(pair.private_key_file))
        # If the two do not match, the private key is the right one.
        if not pair.public_key_file.exists() or pair.public_key_file.read_bytes() != public_pem:
            replace_file(pair.public_key_file, public_pem)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write a development key to {directory} ({error.strerror}): "
            "choose a writable directory"
        ) from error
    return pair


def mint_token(
    private_key_file: Path,
    *,
    issuer: str,
    audience: str,
    subject: str,
    scopes: Iterable[str],
    merchant_id: str | None,
    lifetime: timedelta,
) -> str:
    """Return a token (JWT, RFC 7519) signed with a development key, issued now."""
    key = _read_private_key(private_key_file)
    now = int(time.time())
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": audience,
        "sub": subject,
        "scope": " ".join(scopes),
        "iat": now,
        "exp": now + int(lifetime.total_seconds()),
    }
    if merchant_id is not None:
        claims["merchant_id"] = merchant_id
    return jwt.encode(claims, key, algorithm="EdDSA")


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}): name a development key's private.pem"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(
            f"{path} is not an Ed25519 private key in PEM: delete it, and a new one is created"
        )
    return key


def _private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
