"""Who is calling, as its verified token says, and what it may do.

A `Principal` exists only after a token has been verified; nothing in a request can change it.
"""

from dataclasses import dataclass
from enum import StrEnum

from core.errors import PermissionDenied


class Scope(StrEnum):
    """What a token may be good for; the words of its `scope` claim. None includes another."""

    MANAGE = "webhooks:manage"
    PUBLISH = "events:publish"
    ADMIN = "webhooks:admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """One verified caller. `expires_at` is the token's `exp`, for calls that outlive it."""

    subject: str
    merchant_id: str | None
    scopes: frozenset[str]
    expires_at: int

    def require(self, scope: Scope) -> None:
        """Refuse the call unless the token carries this scope."""
        if scope not in self.scopes:
            raise PermissionDenied(
                f"this call needs a token with the scope {scope}",
                reason="SCOPE_MISSING",
                metadata={"scope": scope.value},
            )

    def merchant(self) -> str:
        """The merchant this token speaks for; a call about one merchant's data asks here first."""
        if self.merchant_id is None:
            raise PermissionDenied(
                "this call needs a token with a merchant_id claim", reason="MERCHANT_MISSING"
            )
        return self.merchant_id


def parse_certificate_scopes(text: str) -> tuple[tuple[str, frozenset[Scope]], ...]:
    """`identity=scope scope` pairs between commas: what certificates are good for.

    Raises ValueError, which says what is wrong. An identity is a URI (SPIFFE) or a DNS name.
    """
    return tuple(_certificate_scopes(part.strip()) for part in text.split(",") if part.strip())


def _certificate_scopes(text: str) -> tuple[str, frozenset[Scope]]:
    identity, _, words = (part.strip() for part in text.rpartition("="))
    if not (identity and identity.isascii() and identity.isprintable() and " " not in identity):
        raise ValueError(f"{text!r} must be identity=scope, as in spiffe://bank/pay=events:publish")
    scopes = words.split()
    if not scopes or not set(scopes) <= set(Scope):
        raise ValueError(f"the scopes of {identity} must be among {', '.join(Scope)}")
    return canonical_identity(identity), frozenset(Scope(word) for word in scopes)


def canonical_identity(identity: str) -> str:
    """How a name of a certificate is compared: DNS names have no case, URIs do."""
    return identity if "://" in identity else identity.lower()
