"""What the result of an attempt makes of its delivery (pure)."""

import random
from collections.abc import Callable, Sequence
from datetime import datetime

from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.queue import LeasedDelivery, Settlement
from delivery.http.outcome import final_state
from delivery.settings import DeliverySettings
from delivery.webhooks import Webhook


def requested_pause_seconds(result: AttemptResult, settings: DeliverySettings) -> float:
    """For how long the receiver wants to be left alone, as far as it is granted; 0: not at all."""
    wish = result.retry_after_seconds or 0.0
    return min(wish, settings.retry_after_max_seconds) if wish > 0 else 0.0


def decide(
    delivery: LeasedDelivery,
    webhook: Webhook,
    settings: DeliverySettings,
    started_at: datetime,
    result: AttemptResult,
) -> Settlement:
    """Final state or another attempt, and when: the one place where this is decided."""
    backoff = _backoff(delivery, webhook, settings, result.outcome)
    state = final_state(result.outcome, result.status_code, backoff)
    # A receiver may ask for more time, never for less.
    wait = max(backoff or 0.0, requested_pause_seconds(result, settings))
    return Settlement(
        delivery_id=delivery.id,
        lease_id=delivery.lease_id,
        webhook_id=delivery.webhook_id,
        merchant_id=delivery.merchant_id,
        due_since=delivery.due_since,
        number=delivery.attempt_count + 1,
        started_at=started_at,
        result=result,
        final_state=state,
        next_attempt_in_seconds=wait if state is None else 0,
        blamed_version=webhook.version if state is DeliveryState.FAILED else None,
    )


def _backoff(
    delivery: LeasedDelivery, webhook: Webhook, settings: DeliverySettings, outcome: Outcome
) -> float | None:
    """Faults of ours and what receivers do wrong are counted apart: neither spends the other's."""
    # Jitter keeps receivers from being called in step; nobody gains from predicting it.
    if outcome is Outcome.INTERNAL_ERROR:
        return fault_backoff(delivery.fault_count + 1, settings.max_fault_retries, random.random)
    schedule = backoff_schedule(
        settings.retry_schedule_seconds, settings.max_retries, webhook.retry_schedule_seconds
    )
    # Not less than one, whatever somebody's SQL has left there.
    made = max(delivery.attempt_count + 1 - delivery.fault_count, 1)
    return next_backoff(schedule, made, random.random)


# When the next automatic attempt is due, or that there is none (pure).

#: A retry comes up to this much later than its schedule says, never earlier: receivers that failed
#: together are not called again together.
JITTER = 0.2

#: What a fault of ours waits for is our own recovery, which takes moments or an operator.
_FAULT_SECONDS = 1.0
_FAULT_SECONDS_MAX = 900.0


def backoff_schedule(
    operator_schedule: Sequence[float], max_retries: int, own_schedule: Sequence[float]
) -> tuple[float, ...]:
    """The waits in seconds before each retry of a webhook config, one entry a retry.

    Its own schedule is taken as it is; the operator's is cut or its last wait repeated to give
    `max_retries` entries.
    """
    if own_schedule:
        return tuple(own_schedule)
    last = operator_schedule[-1]
    padding = (last,) * (max_retries - len(operator_schedule))
    return (*operator_schedule, *padding)[:max_retries]


def next_backoff(
    schedule: Sequence[float], attempts_made: int, random: Callable[[], float]
) -> float | None:
    """Seconds until the next attempt after `attempts_made` (≥ 1) attempts; None: give up."""
    if attempts_made > len(schedule):
        return None
    return schedule[attempts_made - 1] * (1 + JITTER * random())


def fault_backoff(faults: int, retries: int, random: Callable[[], float]) -> float | None:
    """Seconds until the next attempt after `faults` (≥ 1) that were broken by us; None: give up."""
    if faults > retries:
        return None
    # Their number has no bound that keeps a power of it small.
    wait = min(_FAULT_SECONDS * 2.0 ** min(faults - 1, 20), _FAULT_SECONDS_MAX)
    return wait * (1 + JITTER * random())
