"""When an engine opens and closes the breaker of a config."""

from datetime import UTC, datetime, timedelta

import pytest

from core.ids import new_id
from core.queue import BreakerChange, LeasedDelivery
from delivery.fairness.breaker import Breaker
from tests.support.clock import ManualClock

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ONE, OTHER = new_id(), new_id()


def delivery(webhook_id: object = ONE, open_until: datetime | None = None) -> LeasedDelivery:
    return LeasedDelivery(
        id=new_id(),
        lease_id=new_id(),
        webhook_id=webhook_id,  # type: ignore[arg-type]
        webhook_version=1,
        webhook_active=True,
        webhook_deleted=False,
        breaker_open_until=open_until,
        has_backlog=False,
        event_id=new_id(),
        merchant_id="m_1",
        event_type="payment.succeeded",
        content_type="application/json",
        payload=b"{}",
        attempt_count=0,
        fault_count=0,
        due_since=NOW,
        claimed_at=NOW,
    )


PROBE = delivery(open_until=NOW - timedelta(seconds=1))


def test_breaker_trips_after_failures_over_time() -> None:
    clock = ManualClock()
    breaker = Breaker(10, 5.0, clock)
    changes = []
    for _ in range(10):
        changes.append(breaker.decide(delivery(), False, 0))
        clock.now += 0.6
    assert changes == [None] * 9 + [BreakerChange(ONE, None, trips=True, failures=10, version=1)]
    # The count starts at zero again.
    assert breaker.decide(delivery(), False, 0) is None


def test_short_outage_does_not_trip_breaker() -> None:
    clock = ManualClock()
    breaker = Breaker(10, 5.0, clock)
    for _ in range(500):
        assert breaker.decide(delivery(), False, 0) is None
        clock.now += 0.009
    assert breaker.decide(delivery(), True, 0) is None
    clock.now += 100
    assert breaker.decide(delivery(), False, 0) is None


def test_retries_of_one_delivery_do_not_trip_breaker() -> None:
    clock = ManualClock()
    breaker = Breaker(10, 5.0, clock)
    for wait in (1, 10, 60, 0):
        assert breaker.decide(delivery(), False, 0) is None
        clock.now += wait


@pytest.mark.parametrize("works", [True, None])
def test_only_success_resets_failures(works: bool | None) -> None:
    clock = ManualClock()
    breaker = Breaker(3, 0.0, clock)
    assert not any(breaker.decide(delivery(), result, 0) for result in (False, False, works))
    assert bool(breaker.decide(delivery(), False, 0)) is (works is None)


def test_failures_count_per_config() -> None:
    breaker = Breaker(3, 0.0, ManualClock())
    results = [breaker.decide(delivery(w), False, 0) for w in (ONE, OTHER, ONE, OTHER, ONE)]
    assert [bool(change) for change in results] == [False] * 4 + [True]


def test_one_probe_decides() -> None:
    breaker = Breaker(10, 5.0, ManualClock())
    seen = PROBE.breaker_open_until
    assert breaker.decide(PROBE, False, 0) == BreakerChange(
        ONE, seen, trips=True, failures=1, version=1
    )
    assert breaker.decide(PROBE, None, 0) is None
    assert breaker.decide(PROBE, True, 0) == BreakerChange(ONE, seen, version=1)


def test_attempt_from_before_opening_does_not_close_breaker() -> None:
    assert Breaker(10, 5.0, ManualClock()).decide(delivery(), True, 0) is None


def test_requested_pause_applies_at_first_failure() -> None:
    breaker = Breaker(10, 5.0, ManualClock())
    change = breaker.decide(delivery(), False, 30.0)
    assert change == BreakerChange(ONE, None, requested_pause_seconds=30.0, failures=1, version=1)
    assert breaker.decide(delivery(), True, 0) is None
