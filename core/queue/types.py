"""What goes into the queue and comes out of it.

Named tuples where one is made for each event or delivery: they can be changed as little as frozen
dataclasses, and are made in a third of the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from core.lifecycle import DeactivationReason, DeliveryState, Outcome

#: asyncpg connection, or a pool (which runs each statement on a connection of its own).
type Connection = Any


class NewEvent(NamedTuple):
    """An event that passed validation; `content_hash` matters only beside an idempotency key."""

    id: UUID
    merchant_id: str
    type: str
    content_type: str
    payload: bytes
    idempotency_key: str | None
    content_hash: bytes
    not_before: datetime | None = None
    ordering_key: str | None = None
    #: `traceparent` of the call that published it.
    trace_parent: str | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """The open deliveries of one ordering key to one webhook config, which go one at a time."""

    webhook_id: UUID
    ordering_key: str


class LeasedDelivery(NamedTuple):
    """A claimed delivery with all an attempt needs except its webhook config.

    After the lease, the claim's columns in their order.
    """

    lease_id: UUID
    id: UUID
    webhook_id: UUID
    #: Version of the config at the claim, and whether it may be called at all.
    webhook_version: int
    webhook_active: bool
    webhook_deleted: bool
    #: The config's breaker at the claim: None when it was closed.
    breaker_open_until: datetime | None
    #: Whether more of the config's deliveries were parked.
    has_backlog: bool
    event_id: UUID
    merchant_id: str
    event_type: str
    content_type: str
    payload: bytes
    attempt_count: int
    #: How many of them a fault of ours broke.
    fault_count: int
    #: When it was accepted or asked for again, or later: its event's not_before.
    owed_since: datetime
    claimed_at: datetime
    #: Of the call that published the event, as it is stored.
    trace_parent: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether the config's breaker was open: nothing of it may be sent."""
        return self.breaker_open_until is not None and self.breaker_open_until > self.claimed_at

    @property
    def is_probe(self) -> bool:
        """Whether the config's breaker was half-open: how this one fares decides about it."""
        return self.breaker_open_until is not None and not self.is_held


class Settlement(NamedTuple):
    """The result of one attempt, and what follows: a final state, or a wait before the next."""

    delivery_id: UUID
    lease_id: UUID
    outcome: Outcome
    status_code: int | None
    detail: str
    started_at: datetime
    duration_us: int
    final_state: DeliveryState | None
    retry_after_seconds: float
    dns_us: int | None = None
    connect_us: int | None = None
    tls_us: int | None = None
    first_byte_us: int | None = None
    remote_address: str | None = None
    response_excerpt: str = ""
    #: Of one that failed for good: the version of the config that it was sent by. What was sent by
    #: an older one than the present, to another URL perhaps, is not held against the config.
    blamed_version: int | None = None
    #: Which attempt it was, whose, and since when it was owed: for who counts what is settled.
    number: int = 1
    merchant_id: str = ""
    owed_since: datetime | None = None
    #: Whose place is free again once this is on record.
    webhook_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What a settle changed: deliveries whose lease still held, and configs it deactivated.

    The first of each of these chains has ended: promote the next once the settle is committed.
    """

    delivery_ids: frozenset[UUID]
    deactivated: Mapping[UUID, DeactivationReason]
    ended_chains: tuple[Chain, ...] = ()
    #: Those that were to fail by a config which has been changed since; they are open, and due.
    outdated: frozenset[UUID] = frozenset()


@dataclass(frozen=True, slots=True)
class BreakerChange:
    """What attempts showed of a config: that it must be held, or (neither of both) may go on.

    `seen` is its breaker as the claim read it: a change on the word of another state is none.
    """

    webhook_id: UUID
    seen: datetime | None
    #: It fails and fails: held for the next cool-down.
    trips: bool = False
    #: It asked to be left alone for so long.
    asked_seconds: float = 0.0
    #: Failed attempts in a row that led to it, for the log.
    failures: int = 0
    #: Version of the config at that claim: of a changed one, with another URL perhaps, it says
    #: nothing.
    version: int | None = None
