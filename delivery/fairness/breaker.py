"""Decides when the circuit breaker of a webhook config opens or closes. Pure.

Each engine counts the failures that it sees. The resulting change is written to the database, where
it applies to all engines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from core.queue import BreakerChange, LeasedDelivery

#: Failing configs that are remembered. Above this number all counts restart.
_CONFIGS_MAX = 50_000


@dataclass(slots=True)
class _FailureStreak:
    failures: int
    since: float


class Breaker:
    """Counts consecutive failed attempts of each config.

    A breaker opens after `failures` of them if the first one is at least `seconds` ago.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = monotonic):
        self._failures = failures
        self._seconds = seconds
        self._clock = clock
        self._streaks: dict[UUID, _FailureStreak] = {}

    def decide(
        self,
        delivery: LeasedDelivery,
        endpoint_works: bool | None,
        requested_pause_seconds: float,
    ) -> BreakerChange | None:
        """Return the change that follows from an attempt, or None.

        `endpoint_works` is None if the outcome says nothing about the endpoint.
        `requested_pause_seconds` is the receiver's Retry-After, or 0. A probe always decides.
        """
        if endpoint_works is None:
            return None
        if endpoint_works:
            self._streaks.pop(delivery.webhook_id, None)
            return _change(delivery) if delivery.is_probe else None
        streak = self._count_failure(delivery.webhook_id)
        lasted = self._clock() - streak.since
        trips = delivery.is_probe or (streak.failures >= self._failures and lasted >= self._seconds)
        if trips:
            del self._streaks[delivery.webhook_id]
        if not trips and not requested_pause_seconds:
            return None
        return _change(delivery, trips, requested_pause_seconds, streak.failures)

    def _count_failure(self, webhook_id: UUID) -> _FailureStreak:
        if len(self._streaks) > _CONFIGS_MAX:
            self._streaks.clear()
        streak = self._streaks.setdefault(webhook_id, _FailureStreak(0, self._clock()))
        streak.failures += 1
        return streak


def _change(
    delivery: LeasedDelivery,
    trips: bool = False,
    requested_pause_seconds: float = 0.0,
    failures: int = 0,
) -> BreakerChange:
    return BreakerChange(
        webhook_id=delivery.webhook_id,
        seen=delivery.breaker_open_until,
        trips=trips,
        requested_pause_seconds=requested_pause_seconds,
        failures=failures,
        version=delivery.webhook_version,
    )
