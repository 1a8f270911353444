"""Turns a bearer token into a Principal, or refuses it without a reason.

It checks the signature, times and claims. A verified token is remembered until it expires or its
key is withdrawn. The key determines the algorithm; the token does not.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jwt

from core.errors import Unauthenticated
from core.ids import is_merchant_id
from server.auth.jwks import KeySource, VerificationKey
from server.auth.principal import Principal

MAX_TOKEN_BYTES = 4096
MAX_REMEMBERED_TOKENS = 10_000
#: How long a remembered token stays valid after its key was withdrawn.
RECALL_SECONDS = 1.0

_MAX_SUBJECT_CHARACTERS = 255


def token_refused() -> Unauthenticated:
    """Return the error for every missing or bad token. It is always the same."""
    return Unauthenticated(
        "missing or invalid token: send `authorization: Bearer <JWT>` with a token of the "
        "configured issuer that is meant for this service and has not expired",
        reason="TOKEN_INVALID",
    )


@dataclass(slots=True)
class _Verified:
    principal: Principal
    kid: str | None
    key: VerificationKey
    #: When the key was last found in the key set.
    checked_at: float


class TokenVerifier:
    """Verifies tokens of one issuer for one audience. Times are seconds; `clock` is Unix time."""

    def __init__(
        self,
        keys: KeySource,
        *,
        issuer: str,
        audience: str,
        max_lifetime_seconds: float,
        leeway_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ):
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._max_lifetime = max_lifetime_seconds
        self._leeway = leeway_seconds
        self._clock = clock
        self._remembered: dict[bytes, _Verified] = {}

    def recall(self, token: str) -> Principal | None:
        """Return the caller of a token that was verified within the last second, or None.

        Raises Unauthenticated for a text that cannot be a token.
        """
        remembered = self._remembered.get(_digest(token))
        if remembered is None:
            return None
        caller = remembered.principal
        is_fresh = 0 <= self._clock() - remembered.checked_at < RECALL_SECONDS
        return caller if is_fresh and not self._is_expired(caller.expires_at) else None

    async def verify(self, token: str) -> Principal:
        """Return the caller. Raises Unauthenticated for a bad token, Unavailable without keys."""
        digest = _digest(token)
        remembered = self._remembered.get(digest)
        if remembered is not None and await self._still_holds(remembered):
            return remembered.principal
        self._remembered.pop(digest, None)
        try:
            verified = await self._verify(token)
        except jwt.PyJWTError:
            raise token_refused() from None
        # Only valid tokens get here, so an attacker cannot flush this cache.
        if len(self._remembered) >= MAX_REMEMBERED_TOKENS:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = verified
        return verified.principal

    async def _still_holds(self, verified: _Verified) -> bool:
        if self._is_expired(verified.principal.expires_at):
            return False
        # This also refreshes the key set while all tokens are remembered.
        if verified.key not in await self._keys.keys_for(verified.kid):
            return False
        verified.checked_at = self._clock()
        return True

    async def _verify(self, token: str) -> _Verified:
        header = jwt.get_unverified_header(token)
        if "crit" in header:
            raise jwt.InvalidTokenError("crit")
        kid = header.get("kid")
        for key in await self._keys.keys_for(kid):
            try:
                claims = self._decode(token, key)
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError):
                continue
            self._check_times(claims)
            return _Verified(_principal_of(claims), kid, key, self._clock())
        raise jwt.InvalidSignatureError("no key verifies it")

    def _decode(self, token: str, key: VerificationKey) -> dict[str, Any]:
        return jwt.decode(
            token,
            key.public_key,
            algorithms=[key.algorithm],
            audience=self._audience,
            issuer=self._issuer,
            options={
                "require": ["exp", "iat", "aud", "iss", "sub"],
                "enforce_minimum_key_length": True,
                # PyJWT accepts "1e3", true and 1.5 as times, and uses the system clock.
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )

    def _check_times(self, claims: dict[str, Any]) -> None:
        issued_at, expires_at = claims["iat"], claims["exp"]
        not_before = claims.get("nbf", issued_at)
        # isinstance() would accept bool. A float may be inf or nan.
        if not all(type(moment) is int for moment in (issued_at, expires_at, not_before)):
            raise jwt.InvalidTokenError("times")
        if max(issued_at, not_before) > self._clock() + self._leeway:
            raise jwt.ImmatureSignatureError
        if self._is_expired(expires_at):
            raise jwt.ExpiredSignatureError
        if not 0 < expires_at - issued_at <= self._max_lifetime:
            raise jwt.InvalidTokenError("lifetime")

    def _is_expired(self, expires_at: int) -> bool:
        return expires_at <= self._clock() - self._leeway


def _digest(token: str) -> bytes:
    """Return the key of a remembered token. Raises Unauthenticated for an impossible token."""
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise token_refused()
    return hashlib.sha256(token.encode("ascii")).digest()


def _principal_of(claims: dict[str, Any]) -> Principal:
    subject = claims["sub"]
    # Printable, because it is stored in the audit log, and PostgreSQL refuses NUL.
    if not (0 < len(subject) <= _MAX_SUBJECT_CHARACTERS and subject.isprintable()):
        raise jwt.InvalidTokenError("sub")
    return Principal(subject, _merchant_id_of(claims), _scopes_of(claims), claims["exp"])


def _merchant_id_of(claims: dict[str, Any]) -> str | None:
    if "merchant_id" not in claims:
        return None
    merchant_id = claims["merchant_id"]
    if not (isinstance(merchant_id, str) and is_merchant_id(merchant_id)):
        raise jwt.InvalidTokenError("merchant_id")
    return merchant_id


def _scopes_of(claims: dict[str, Any]) -> frozenset[str]:
    """Return the `scope` claim of RFC 8693, or the list that some issuers send, also as `scp`."""
    scope = claims.get("scope", claims.get("scp", ""))
    words = scope.split() if isinstance(scope, str) else scope
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise jwt.InvalidTokenError("scope")
    return frozenset(words)
