"""The errors that Postrider reports to callers and operators.

    PostriderError
    ├── InvalidArgument      the request is invalid; names each field
    ├── Unauthenticated      no token, or an invalid token
    ├── PermissionDenied     a valid token without the needed scope
    ├── NotFound             unknown id for this merchant (the same for another merchant's id)
    ├── AlreadyExists        the name or the idempotency key is taken
    ├── FailedPrecondition   valid request, but not in the current state
    ├── QuotaExceeded        a limit of the merchant or of the service is reached
    ├── Aborted              a concurrent change won; read again and repeat
    ├── Unavailable          a dependency is down; repeat the same call
    └── ConfigurationError   a setting is missing or invalid; the process does not start

`server/rpc/status.py` maps them to gRPC statuses. Each has a `reason`, a stable UPPER_SNAKE_CASE
word for programs, and a message with the next step for people. Neither may contain internals:
stack traces, SQL, our addresses or secrets.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """An invalid field: its path in the request (`webhook_config.url`) and how to fix it."""

    field: str
    description: str
    reason: str


class PostriderError(Exception):
    """Base class. Raise a subclass."""

    def __init__(self, message: str, *, reason: str, metadata: Mapping[str, str] | None = None):
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})


class InvalidArgument(PostriderError):
    """One or more fields are invalid. The message joins their descriptions."""

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
    """The caller is unknown. The message hides which check failed, because that helps forgers."""


class PermissionDenied(PostriderError):
    """The caller lacks a scope. The message names it."""


class NotFound(PostriderError):
    """The caller has no resource with this id."""


class AlreadyExists(PostriderError):
    """The name or key belongs to a different resource."""


class FailedPrecondition(PostriderError):
    """The state of the resource does not allow the call. The message names the state that does."""


class QuotaExceeded(PostriderError):
    """A limit is reached. `subject` is its owner: a merchant or the service.

    `retry_after_seconds` is set for rate limits. None means that waiting does not help.
    """

    def __init__(
        self, message: str, *, reason: str, subject: str, retry_after_seconds: float | None = None
    ):
        super().__init__(message, reason=reason)
        self.subject = subject
        self.retry_after_seconds = retry_after_seconds


class Aborted(PostriderError):
    """A concurrent change won. Read again and repeat the call."""


class Unavailable(PostriderError):
    """A dependency is down. Repeat with the same idempotency keys after `retry_after_seconds`."""

    def __init__(self, message: str, *, reason: str, retry_after_seconds: float = 1.0):
        super().__init__(message, reason=reason)
        self.retry_after_seconds = retry_after_seconds


class ConfigurationError(PostriderError):
    """The process cannot start. The message names the setting and the fix."""

    def __init__(self, message: str):
        super().__init__(message, reason="CONFIGURATION")
