"""The queue of open deliveries: all statements that change one. Start at claim and settle.

Ready, parked, leased and blocked deliveries are rows of one table; finished ones leave it. Only the
database's clock counts. A claim takes a lease, and every statement that ends a lease checks its id,
so a late engine changes nothing. Functions run in the transaction of the connection they get.
docs/design/architecture.md draws the states.
"""

from core.queue.backlog import (
    admit,
    park_due,
    park_leased,
    park_webhooks,
    webhooks_with_backlog,
)
from core.queue.breakers import close_breakers, open_breakers
from core.queue.claim import claim, reclaim, reclaimed_often, release, release_claimed
from core.queue.enqueue import BURST_EVENTS, CHANNEL, Accepted, enqueue, enqueue_in_order, notify
from core.queue.invariants import Finding, check_invariants
from core.queue.open_ranges import count_open, old_events_of_open, open_between
from core.queue.ordering import chains_after, promote
from core.queue.rate_limit import spend_rate
from core.queue.redelivery import (
    BEGINNING,
    FailedFilter,
    RedeliveredPage,
    RedeliveryPosition,
    redeliver,
    redeliver_failed,
)
from core.queue.settle import cancel_some, cancel_webhook, held, held_webhooks, settle
from core.queue.stats import QueueStats, read_queue_stats
from core.queue.types import (
    BreakerChange,
    Chain,
    LeasedDelivery,
    NewEvent,
    Settlement,
    SettleResult,
)
from core.queue.vacuum import has_many_dead, vacuum

__all__ = [
    "BEGINNING",
    "BURST_EVENTS",
    "CHANNEL",
    "Accepted",
    "BreakerChange",
    "Chain",
    "FailedFilter",
    "Finding",
    "LeasedDelivery",
    "NewEvent",
    "QueueStats",
    "RedeliveredPage",
    "RedeliveryPosition",
    "SettleResult",
    "Settlement",
    "admit",
    "cancel_some",
    "cancel_webhook",
    "chains_after",
    "check_invariants",
    "claim",
    "close_breakers",
    "count_open",
    "enqueue",
    "enqueue_in_order",
    "has_many_dead",
    "held",
    "held_webhooks",
    "notify",
    "old_events_of_open",
    "open_between",
    "open_breakers",
    "park_due",
    "park_leased",
    "park_webhooks",
    "promote",
    "read_queue_stats",
    "reclaim",
    "reclaimed_often",
    "redeliver",
    "redeliver_failed",
    "release",
    "release_claimed",
    "settle",
    "spend_rate",
    "vacuum",
    "webhooks_with_backlog",
]
