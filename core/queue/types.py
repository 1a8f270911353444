"""The records that go into the queue and come out of it.

Records that exist once per event or delivery are named tuples, which are created three times as
fast as frozen dataclasses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from core.lifecycle import AttemptResult, DeactivationReason, DeliveryState


class NewEvent(NamedTuple):
    """A validated event. `content_hash` is used only together with an idempotency key."""

    id: UUID
    merchant_id: str
    type: str
    content_type: str
    payload: bytes
    idempotency_key: str | None
    content_hash: bytes
    not_before: datetime | None = None
    ordering_key: str | None = None
    #: `traceparent` of the call that published the event.
    trace_parent: str | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """The open deliveries of one ordering key to one webhook config. They go one at a time."""

    webhook_id: UUID
    ordering_key: str


class LeasedDelivery(NamedTuple):
    """A claimed delivery, with everything that an attempt needs except its webhook config."""

    lease_id: UUID
    id: UUID
    webhook_id: UUID
    #: The config at the time of the claim.
    webhook_version: int
    webhook_active: bool
    webhook_deleted: bool
    #: None if the breaker was closed.
    breaker_open_until: datetime | None
    #: Whether the config had parked deliveries.
    has_backlog: bool
    event_id: UUID
    merchant_id: str
    event_type: str
    content_type: str
    payload: bytes
    #: Attempts so far.
    attempt_count: int
    #: Attempts that ended with an internal error.
    fault_count: int
    #: When the delivery first became due: its creation, or the event's `not_before` if later.
    due_since: datetime
    claimed_at: datetime
    #: `traceparent` of the call that published the event.
    trace_parent: str | None = None

    @property
    def breaker_is_open(self) -> bool:
        """Whether the config's breaker was open, so that nothing may be sent."""
        return self.breaker_open_until is not None and self.breaker_open_until > self.claimed_at

    @property
    def is_probe(self) -> bool:
        """Whether the breaker was half-open, so that this attempt opens or closes it."""
        return self.breaker_open_until is not None and not self.breaker_is_open


class Settlement(NamedTuple):
    """The end of a lease: the attempt, and either a final state or the wait before the next one."""

    delivery_id: UUID
    lease_id: UUID
    webhook_id: UUID
    merchant_id: str
    due_since: datetime
    #: Number of this attempt, from 1.
    number: int
    started_at: datetime
    result: AttemptResult
    #: None if another attempt follows.
    final_state: DeliveryState | None
    next_attempt_in_seconds: float = 0.0
    #: Version of the config that a failed delivery was sent with. A failure of an older version
    #: does not count against the current one, which may have another URL.
    blamed_version: int | None = None


@dataclass(frozen=True, slots=True)
class SettleResult:
    """The changes of a settle."""

    #: Deliveries whose lease was still valid.
    delivery_ids: frozenset[UUID]
    #: Configs that were deactivated.
    deactivated: Mapping[UUID, DeactivationReason]
    #: Chains whose first delivery ended. Promote the next one after the commit.
    ended_chains: tuple[Chain, ...] = ()
    #: Deliveries that stay open and are due now, because their config changed after the request.
    outdated: frozenset[UUID] = frozenset()


@dataclass(frozen=True, slots=True)
class BreakerChange:
    """A change of one config's breaker that follows from its attempts.

    It opens the breaker if `trips` is set or `requested_pause_seconds` is positive, else it closes
    the breaker. `seen` is the breaker at the claim: a trip in another state is ignored.
    """

    webhook_id: UUID
    seen: datetime | None
    trips: bool = False
    #: The Retry-After of the receiver, limited. 0 if it sent none.
    requested_pause_seconds: float = 0.0
    #: Consecutive failed attempts, for the log.
    failures: int = 0
    #: Version of the config at the claim. A change for an older version is ignored.
    version: int | None = None
