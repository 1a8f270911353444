"""The queue: every statement that moves an open delivery, and nothing else.

Ready, parked, leased and blocked rows are one table; final states leave it. Only the database's
clock decides. A claim is a lease; every statement that ends a lease is fenced by its id, so an
engine that was frozen and wakes late changes nothing. Each function takes the caller's connection
and runs in its transaction, if it has one; docs/architecture.md draws the states.
"""

from core.queue.backlog import (
    admit,
    park_due,
    park_leased,
    park_webhooks,
    spend_rate,
    webhooks_with_backlog,
)
from core.queue.breakers import close_breakers, open_breakers
from core.queue.claim import claim, reclaim, reclaimed_often, release, release_claimed
from core.queue.enqueue import BURST_EVENTS, CHANNEL, Accepted, enqueue, enqueue_in_order, notify
from core.queue.invariants import Finding, check_invariants
from core.queue.open_ranges import old_events_of_open, open_between, standing
from core.queue.ordering import chains_after, promote
from core.queue.redelivery import (
    BEGINNING,
    FailedFilter,
    Place,
    RedeliveredPage,
    redeliver,
    redeliver_failed,
)
from core.queue.settle import cancel_some, cancel_webhook, held, held_webhooks, settle
from core.queue.stats import Depth, measure_depth
from core.queue.types import (
    BreakerChange,
    Chain,
    Connection,
    LeasedDelivery,
    NewEvent,
    Settled,
    Settlement,
)
from core.queue.vacuum import has_many_dead, vacuum

__all__ = [
    "BEGINNING",
    "BURST_EVENTS",
    "CHANNEL",
    "Accepted",
    "BreakerChange",
    "Chain",
    "Connection",
    "Depth",
    "FailedFilter",
    "Finding",
    "LeasedDelivery",
    "NewEvent",
    "Place",
    "RedeliveredPage",
    "Settled",
    "Settlement",
    "admit",
    "cancel_some",
    "cancel_webhook",
    "chains_after",
    "check_invariants",
    "claim",
    "close_breakers",
    "enqueue",
    "enqueue_in_order",
    "has_many_dead",
    "held",
    "held_webhooks",
    "measure_depth",
    "notify",
    "old_events_of_open",
    "open_between",
    "open_breakers",
    "park_due",
    "park_leased",
    "park_webhooks",
    "promote",
    "reclaim",
    "reclaimed_often",
    "redeliver",
    "redeliver_failed",
    "release",
    "release_claimed",
    "settle",
    "spend_rate",
    "standing",
    "vacuum",
    "webhooks_with_backlog",
]
