"""The closed tree of everything Postrider can refuse, and why.

    PostriderError
    ├── InvalidArgument      the request is wrong in itself; names each field
    ├── Unauthenticated      no token, or one that does not verify
    ├── PermissionDenied     a valid token that may not do this
    ├── NotFound             no such thing for this merchant (a foreign id looks the same)
    ├── AlreadyExists        the name or the idempotency key is taken by something else
    ├── FailedPrecondition   right in itself, but not in the present state
    ├── QuotaExceeded        a limit of the merchant or the service is reached
    ├── Aborted              somebody else changed it first; read it again
    ├── Unavailable          a part we need is away; the same call may be sent again
    └── ConfigurationError   a setting is missing or wrong; the process does not start

`server/rpc/status.py` alone turns them into gRPC statuses. Each carries a `reason`, a stable
UPPER_SNAKE_CASE word for programs, and a message that tells a person what to do. Neither may hold
anything internal: no stack, no SQL, no address of ours, no secret.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path as in the request (`webhook_config.url`), and what to do."""

    field: str
    description: str
    reason: str


class PostriderError(Exception):
    """Base of the tree; never raised itself."""

    def __init__(self, message: str, *, reason: str, metadata: Mapping[str, str] | None = None):
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})


class InvalidArgument(PostriderError):
    """One or more fields are wrong; the message joins their descriptions."""

    def __init__(self, *violations: FieldViolation):
        super().__init__(
            "; ".join(f"{v.field}: {v.description}" for v in violations),
            reason=violations[0].reason,
        )
        self.violations = violations

    @classmethod
    def of(cls, field: str, description: str, *, reason: str) -> "InvalidArgument":
        return cls(FieldViolation(field, description, reason))


class Unauthenticated(PostriderError):
    """The caller is not known. The message never says which check failed: it would help forgers."""


class PermissionDenied(PostriderError):
    """The caller is known and may not do this; the message names the scope that is missing."""


class NotFound(PostriderError):
    """Nothing under this id for this caller."""


class AlreadyExists(PostriderError):
    """Taken, and by something different from what this call describes."""


class FailedPrecondition(PostriderError):
    """The state of the resource does not allow the call; the message says what would."""


class QuotaExceeded(PostriderError):
    """A limit is reached; `subject` is what it counts for (a merchant, the service).

    One of a rate says after how long the same call may be sent again; None: waiting does not help.
    """

    def __init__(
        self, message: str, *, reason: str, subject: str, retry_after_seconds: float | None = None
    ):
        super().__init__(message, reason=reason)
        self.subject = subject
        self.retry_after_seconds = retry_after_seconds


class Aborted(PostriderError):
    """A concurrent change won; reading again and repeating is safe."""


class Unavailable(PostriderError):
    """A dependency is away; repeat after `retry_after_seconds`, with the same idempotency keys."""

    def __init__(self, message: str, *, reason: str, retry_after_seconds: float = 1.0):
        super().__init__(message, reason=reason)
        self.retry_after_seconds = retry_after_seconds


class ConfigurationError(PostriderError):
    """The process cannot start as configured; the message names the setting and the mend."""

    def __init__(self, message: str):
        super().__init__(message, reason="CONFIGURATION")
