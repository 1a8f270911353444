"""States of a delivery and outcomes of an attempt.

SQL, Python, protobuf, logs and docs use the same words. docs/design/architecture.md draws the
transitions, and the model test of the queue checks them.
"""

from enum import StrEnum
from typing import NamedTuple


class DeliveryState(StrEnum):
    """The first four states are rows of the queue, the others are final."""

    #: Can be claimed at its due time.
    READY = "ready"
    #: In the backlog of its webhook config, until it is admitted.
    PARKED = "parked"
    #: Claimed by one engine until its lease expires.
    LEASED = "leased"
    #: Waits for the previous delivery of the same ordering key.
    BLOCKED = "blocked"
    #: The receiver answered 2xx.
    DELIVERED = "delivered"
    #: All attempts failed, or the address may not be called.
    FAILED = "failed"
    #: The webhook config was deleted before delivery.
    CANCELLED = "cancelled"


OPEN_STATES = frozenset(
    {DeliveryState.READY, DeliveryState.PARKED, DeliveryState.LEASED, DeliveryState.BLOCKED}
)


class Outcome(StrEnum):
    """The result of one attempt. A closed set, so that logs, metrics and retries agree."""

    SUCCEEDED = "succeeded"
    HTTP_ERROR = "http_error"
    TIMEOUT = "timeout"
    DNS_ERROR = "dns_error"
    CONNECTION_ERROR = "connection_error"
    TLS_ERROR = "tls_error"
    PROTOCOL_ERROR = "protocol_error"
    #: The URL or its address may not be called. Permanent, so it is not retried.
    REFUSED = "refused"
    #: Our own error: uses no retry and does not count against the webhook config.
    INTERNAL_ERROR = "internal_error"


class DeactivationReason(StrEnum):
    """Why a webhook config is inactive."""

    PAUSED = "paused"
    FAILURES = "failures"
    ADMIN = "admin"
    GONE = "gone"


class AttemptResult(NamedTuple):
    """The result of one request.

    `duration_us` ends at the status line or at the failure. `detail` is shown to the merchant, so
    it describes the receiver and never our network. A phase that did not happen is None.
    """

    outcome: Outcome
    status_code: int | None
    detail: str
    duration_us: int = 0
    dns_us: int | None = None
    connect_us: int | None = None
    #: Part of `connect_us`.
    tls_us: int | None = None
    first_byte_us: int | None = None
    remote_address: str | None = None
    response_excerpt: str = ""
    #: The Retry-After of a 429 or 503, not limited yet. None if absent or invalid.
    retry_after_seconds: float | None = None


#: The fields of an AttemptResult that are columns of `attempts`, with their SQL types.
ATTEMPT_COLUMNS = {
    "outcome": "text",
    "status_code": "int",
    "detail": "text",
    "duration_us": "int",
    "dns_us": "int",
    "connect_us": "int",
    "tls_us": "int",
    "first_byte_us": "int",
    "remote_address": "text",
    "response_excerpt": "text",
}
