"""The states of a delivery, the outcomes of an attempt, and which state may follow which.

The words are the same in SQL, Python, protobuf, logs and docs; docs/architecture.md draws them.
"""

from enum import StrEnum
from typing import NamedTuple


class DeliveryState(StrEnum):
    """Where a delivery stands; the first four are rows of the queue, the others are final."""

    #: In the queue, attempted when its due time comes.
    READY = "ready"
    #: In its webhook config's own backlog, until the config can take it.
    PARKED = "parked"
    #: Owned by one engine until its lease ends.
    LEASED = "leased"
    #: Waits for the delivery before it of the same ordering key.
    BLOCKED = "blocked"
    #: The receiver answered 2xx.
    DELIVERED = "delivered"
    #: Every attempt failed, or the address is one that is never called.
    FAILED = "failed"
    #: The webhook config was deleted first.
    CANCELLED = "cancelled"


OPEN_STATES = frozenset(
    {DeliveryState.READY, DeliveryState.PARKED, DeliveryState.LEASED, DeliveryState.BLOCKED}
)

TRANSITIONS: dict[DeliveryState, frozenset[DeliveryState]] = {
    DeliveryState.READY: frozenset(
        {DeliveryState.LEASED, DeliveryState.PARKED, DeliveryState.CANCELLED}
    ),
    DeliveryState.PARKED: frozenset({DeliveryState.READY, DeliveryState.CANCELLED}),
    DeliveryState.LEASED: frozenset(DeliveryState) - {DeliveryState.LEASED, DeliveryState.BLOCKED},
    DeliveryState.BLOCKED: frozenset(
        {DeliveryState.READY, DeliveryState.PARKED, DeliveryState.CANCELLED}
    ),
    DeliveryState.DELIVERED: frozenset(),
    DeliveryState.FAILED: frozenset(),
    DeliveryState.CANCELLED: frozenset(),
}


class Outcome(StrEnum):
    """What came of one attempt: a closed set, so that logs, metrics and retries agree."""

    SUCCEEDED = "succeeded"
    HTTP_ERROR = "http_error"
    TIMEOUT = "timeout"
    DNS_ERROR = "dns_error"
    CONNECTION_ERROR = "connection_error"
    TLS_ERROR = "tls_error"
    PROTOCOL_ERROR = "protocol_error"
    #: The URL, or the address behind it, is none that we call: permanent, so it is not retried.
    REFUSED = "refused"
    #: A fault of ours: uses up no retries, and is never counted against the webhook config.
    INTERNAL_ERROR = "internal_error"


class DeactivationReason(StrEnum):
    """Why a webhook config is not active."""

    PAUSED = "paused"
    FAILURES = "failures"
    ADMIN = "admin"
    GONE = "gone"


class AttemptResult(NamedTuple):
    """What came of one request; `duration_us` runs to the status line or to the failure.

    `detail` is for the merchant: it says what their side did, and nothing of our network. Of the
    phases, None is one that did not take place.
    """

    outcome: Outcome
    status_code: int | None
    detail: str
    duration_us: int = 0
    dns_us: int | None = None
    connect_us: int | None = None
    #: Of `connect_us`.
    tls_us: int | None = None
    first_byte_us: int | None = None
    remote_address: str | None = None
    response_excerpt: str = ""
    #: What a 429 or 503 asked for in its Retry-After, not judged yet; None: nothing we understand.
    retry_after_seconds: float | None = None
