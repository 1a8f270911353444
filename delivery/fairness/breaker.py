"""When a webhook config has failed enough to be left alone for a while (pure).

Each engine counts what it sees. What it concludes goes to the database, where it holds for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from core.queue import BreakerChange, LeasedDelivery

#: Failing configs remembered; past this the counts begin anew, and breakers open later.
_MEMORY = 50_000


@dataclass(slots=True)
class _Streak:
    """Failed attempts in a row."""

    failures: int
    since: float


class Breaker:
    """Counts the failed attempts of each config since one that found its receiver working."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = monotonic):
        self._failures = failures
        self._seconds = seconds
        self._clock = clock
        self._streaks: dict[UUID, _Streak] = {}

    def decide(
        self, delivery: LeasedDelivery, works: bool | None, requested_pause_seconds: float
    ) -> BreakerChange | None:
        """What an attempt changes: so many failures in so much time open, a probe decides.

        `works` is what it says of the receiver, None for nothing; `asked_seconds` for how long the
        receiver wants to be left alone, 0 when it did not say.
        """
        if works is None:
            return None
        if works:
            self._streaks.pop(delivery.webhook_id, None)
            return _change(delivery) if delivery.is_probe else None
        streak = self._lengthen(delivery.webhook_id)
        lasts = self._clock() - streak.since
        trips = delivery.is_probe or (streak.failures >= self._failures and lasts >= self._seconds)
        if trips:
            del self._streaks[delivery.webhook_id]
        if not trips and not requested_pause_seconds:
            return None
        return _change(delivery, trips, requested_pause_seconds, streak.failures)

    def _lengthen(self, webhook_id: UUID) -> _Streak:
        if len(self._streaks) > _MEMORY:
            self._streaks.clear()
        streak = self._streaks.setdefault(webhook_id, _Streak(0, self._clock()))
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
