"""The issuer's public keys, from a PEM file or from its key set (JWKS) over HTTPS.

Each key determines its one algorithm. A token, its `kid` included, can cause only a dictionary
look-up and, at most every 30 seconds, a fetch of the fixed URL.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import orjson
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWK

from core.errors import ConfigurationError, Unavailable
from core.file_secrets import ReloadedSecret, Secret

FETCH_INTERVAL_SECONDS = 30.0
FETCH_TIMEOUT_SECONDS = 10.0
REFRESH_AFTER_SECONDS = 300.0
STALE_AFTER_SECONDS = 86_400.0
# Calls that may wait at once for an unknown `kid`.
WAITING_MAX = 100
# Every key of a file is tried for every token, so this limits the cost of a forged token.
MAX_PEM_KEYS = 8

_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key with the only algorithm it may verify."""

    algorithm: Literal["RS256", "ES256", "EdDSA"]
    public_key: RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

    @classmethod
    def of(cls, key: object) -> "VerificationKey":
        """Raises ValueError unless the key is RSA of 2048 bits or more, EC P-256 or Ed25519."""
        match key:
            case RSAPublicKey() if key.key_size >= 2048:
                return cls("RS256", key)
            case EllipticCurvePublicKey() if isinstance(key.curve, SECP256R1):
                return cls("ES256", key)
            case Ed25519PublicKey():
                return cls("EdDSA", key)
        raise ValueError("a key must be RSA of 2048 bits or more, EC P-256, or Ed25519")


class KeySource(Protocol):
    """Provides the keys that may have signed a token."""

    async def keys_for(self, kid: str | None) -> tuple[VerificationKey, ...]:
        """Return the candidates for this `kid`. Raises Unavailable if there are no keys at all."""


class PemKeys:
    """The keys of a PEM file. PEM has no `kid`, so each key is a candidate."""

    def __init__(self, path: Path):
        def parse(text: str) -> tuple[VerificationKey, ...]:
            blocks = list(_PEM_BLOCK.finditer(text.encode()))
            if not 1 <= len(blocks) <= MAX_PEM_KEYS:
                raise _unusable_file(path, f"must hold 1 to {MAX_PEM_KEYS} PEM public keys")
            return tuple(_key_from_pem(path, *block.group(1, 0)) for block in blocks)

        self._keys = ReloadedSecret(
            Secret("WEBHOOK_JWT_PUBLIC_KEY", file=path), parse, public=True, show=len
        )

    async def keys_for(self, kid: str | None) -> tuple[VerificationKey, ...]:  # noqa: ARG002
        return self._keys.current()


def _key_from_pem(path: Path, label: bytes, block: bytes) -> VerificationKey:
    if b"PRIVATE KEY" in label:
        raise _unusable_file(
            path, "holds a private key; put the public half there: openssl pkey -pubout"
        )
    if b"CERTIFICATE" in label:
        raise _unusable_file(
            path, "holds a certificate; put its key there: openssl x509 -pubkey -noout"
        )
    try:
        return VerificationKey.of(load_pem_public_key(block))
    except UnsupportedAlgorithm as error:
        raise _unusable_file(path, "holds a key of an unknown kind") from error
    except ValueError as error:
        raise _unusable_file(path, f"holds an unusable key: {error}") from error


def _unusable_file(path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(f"WEBHOOK_JWT_PUBLIC_KEY_FILE: {path} {problem}")


class JwksKeys:
    """A key set that is refreshed in advance, and stays valid for a day of an issuer's outage.

    `fetch` returns the body of the URL. It follows no redirect and limits the size.
    """

    def __init__(
        self,
        url: str,
        fetch: Callable[[str], Awaitable[bytes]],
        clock: Callable[[], float] = time.monotonic,
    ):
        _check_url(url)
        self._url = url
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str | None, VerificationKey] = {}
        self._loaded_at = float("-inf")
        self._fetched_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0

    async def keys_for(self, kid: str | None) -> tuple[VerificationKey, ...]:
        if self.age_seconds > STALE_AFTER_SECONDS:
            await self._refresh()
            self._require_keys()
        elif self.age_seconds > REFRESH_AFTER_SECONDS:
            self._start_fetch()
        if kid not in self._keys and self._waiting < WAITING_MAX:
            self._waiting += 1
            try:
                await self._refresh()
            finally:
                self._waiting -= 1
        key = self._keys.get(kid)
        return () if key is None else (key,)

    @property
    def age_seconds(self) -> float:
        """Seconds since the last successful fetch, or infinity."""
        return self._clock() - self._loaded_at

    def _require_keys(self) -> None:
        if self.age_seconds > STALE_AFTER_SECONDS:
            wait = self._fetched_at + FETCH_INTERVAL_SECONDS - self._clock()
            raise Unavailable(
                "tokens cannot be verified, because the issuer's keys are unavailable: try again",
                reason="KEYS_UNAVAILABLE",
                retry_after_seconds=max(1.0, wait),
            )

    async def _refresh(self) -> None:
        fetching = self._start_fetch()
        if fetching is not None:
            # asyncio.wait() does not cancel the shared fetch if this caller is cancelled.
            await asyncio.wait([fetching])

    def _start_fetch(self) -> asyncio.Task[None] | None:
        """Return the current fetch, or start one if the last began at least 30 seconds ago."""
        due = self._clock() - self._fetched_at >= FETCH_INTERVAL_SECONDS
        if (self._fetching is None or self._fetching.done()) and due:
            self._fetched_at = self._clock()
            self._fetching = asyncio.create_task(self._load(), name="jwks-fetch")
        return self._fetching

    async def _load(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                document = await self._fetch(self._url)
            keys = keys_from_jwks(document)
        # The old keys stay after any error of the issuer.
        except Exception as error:
            _log.warning("jwks_fetch_failed", url=self._url, error=repr(error))
            return
        self._keys = keys
        self._loaded_at = self._clock()


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        raise ConfigurationError(f"WEBHOOK_JWT_JWKS_URL: {url!r} is not a URL") from None
    if host and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))):
        return
    raise ConfigurationError(
        f"WEBHOOK_JWT_JWKS_URL: {url!r} must begin with https:// (http:// only for loopback)"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def keys_from_jwks(document: bytes) -> dict[str | None, VerificationKey]:
    """Return the usable keys by `kid`. The only key of a set also has the `kid` None.

    Raises ValueError without a usable key, and other errors for a malformed set.
    """
    keys: dict[str | None, VerificationKey] = {}
    usable: list[VerificationKey] = []
    for jwk in orjson.loads(document)["keys"]:
        key = _key_from_jwk(jwk)
        if key is None:
            continue
        usable.append(key)
        if isinstance(jwk.get("kid"), str):
            keys.setdefault(jwk["kid"], key)
    if not usable:
        raise ValueError("no usable key in the set")
    if len(usable) == 1:
        keys[None] = usable[0]
    return keys


def _key_from_jwk(jwk: Any) -> VerificationKey | None:
    try:
        if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
            return None
        # Without `alg`, PyJWK reads the key by its type.
        material = {name: value for name, value in jwk.items() if name != "alg"}
        key = VerificationKey.of(PyJWK(material).key)
    # One unusable key must not affect the others.
    except Exception:
        return None
    return key if jwk.get("alg", key.algorithm) == key.algorithm else None
