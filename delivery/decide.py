"""Stage: decides a delivery's final state or the time of its next attempt. Pure."""

import random
from collections.abc import Callable, Sequence
from datetime import datetime

from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.queue import LeasedDelivery, Settlement
from delivery.http.outcome import final_state
from delivery.settings import DeliverySettings
from delivery.webhooks import Webhook


def requested_pause_seconds(result: AttemptResult, settings: DeliverySettings) -> float:
    """Return the receiver's Retry-After in seconds, limited by the settings. 0 if it sent none."""
    requested = result.retry_after_seconds or 0.0
    return min(requested, settings.retry_after_max_seconds) if requested > 0 else 0.0


def decide(
    delivery: LeasedDelivery,
    webhook: Webhook,
    settings: DeliverySettings,
    started_at: datetime,
    result: AttemptResult,
) -> Settlement:
    """Return the final state, or the wait before the next attempt."""
    backoff = _backoff(delivery, webhook, settings, result.outcome)
    state = final_state(result.outcome, result.status_code, backoff)
    # Retry-After can lengthen the wait, and never shortens it.
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
    """Return the wait in seconds, or None. Internal errors have their own number of retries."""
    if outcome is Outcome.INTERNAL_ERROR:
        return internal_error_backoff(
            delivery.fault_count + 1, settings.max_fault_retries, random.random
        )
    schedule = backoff_schedule(
        settings.retry_schedule_seconds, settings.max_retries, webhook.retry_schedule_seconds
    )
    # At least one, because the columns may have been changed by hand.
    made = max(delivery.attempt_count + 1 - delivery.fault_count, 1)
    return next_backoff(schedule, made, random.random)


#: A retry is delayed by up to this share of its wait, so that endpoints that failed together are
#: not called again together. It is not a secret.
JITTER = 0.2

#: After an internal error Postrider has to recover, which takes moments or an operator.
_INTERNAL_ERROR_SECONDS = 1.0
_INTERNAL_ERROR_SECONDS_MAX = 900.0


def backoff_schedule(
    operator_schedule: Sequence[float], max_retries: int, own_schedule: Sequence[float]
) -> tuple[float, ...]:
    """Return the waits in seconds before each retry of a webhook config.

    A schedule of the config is used unchanged. The operator's is cut, or its last wait is repeated,
    to `max_retries` entries.
    """
    if own_schedule:
        return tuple(own_schedule)
    last = operator_schedule[-1]
    padding = (last,) * (max_retries - len(operator_schedule))
    return (*operator_schedule, *padding)[:max_retries]


def next_backoff(
    schedule: Sequence[float], attempts_made: int, random: Callable[[], float]
) -> float | None:
    """Return the seconds until the next attempt after `attempts_made` ≥ 1, or None to give up."""
    if attempts_made > len(schedule):
        return None
    return schedule[attempts_made - 1] * (1 + JITTER * random())


def internal_error_backoff(errors: int, retries: int, random: Callable[[], float]) -> float | None:
    """Return the seconds until the next attempt after `errors` ≥ 1 internal errors, or None."""
    if errors > retries:
        return None
    # The exponent is limited, because a float overflows after 1,023 doublings.
    wait = min(_INTERNAL_ERROR_SECONDS * 2.0 ** min(errors - 1, 20), _INTERNAL_ERROR_SECONDS_MAX)
    return wait * (1 + JITTER * random())
