"""The verified caller of a call, with its merchant and scopes.

The checks of scopes and merchants are here. A `Principal` exists only after its token or
certificate was verified, and no request can change it.
"""

from dataclasses import dataclass
from enum import StrEnum

from core.errors import PermissionDenied


class Scope(StrEnum):
    """The words of a token's `scope` claim. No scope includes another."""

    MANAGE = "webhooks:manage"
    PUBLISH = "events:publish"
    ADMIN = "webhooks:admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified caller. `expires_at` is the token's `exp`, which ends long streams."""

    subject: str
    merchant_id: str | None
    scopes: frozenset[str]
    expires_at: int

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied unless the token has this scope."""
        if scope not in self.scopes:
            raise PermissionDenied(
                f"this call needs a token with the scope {scope}",
                reason="SCOPE_MISSING",
                metadata={"scope": scope.value},
            )

    def merchant(self) -> str:
        """Return the merchant of the token. Calls on one merchant's data use it in every query."""
        if self.merchant_id is None:
            raise PermissionDenied(
                "this call needs a token with a merchant_id claim", reason="MERCHANT_MISSING"
            )
        return self.merchant_id

    def require_merchant(self, merchant_id: str) -> None:
        """Raise PermissionDenied if the token belongs to another merchant.

        A token without a merchant acts for the platform, and may name any merchant.
        """
        if self.merchant_id not in (None, merchant_id):
            raise PermissionDenied(
                "this token publishes only for the merchant of its merchant_id claim",
                reason="MERCHANT_MISMATCH",
            )


def parse_certificate_scopes(text: str) -> tuple[tuple[str, frozenset[Scope]], ...]:
    """Parse comma-separated `identity=scope scope` pairs: the scopes of client certificates.

    An identity is a URI (SPIFFE) or a DNS name. Raises ValueError with the problem.
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
    """Return the form in which identities are compared: only URIs are case-sensitive."""
    return identity if "://" in identity else identity.lower()
