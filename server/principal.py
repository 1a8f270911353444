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
