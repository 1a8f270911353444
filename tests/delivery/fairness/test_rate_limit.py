"""The pauses of configs whose rate limit is used up."""

from uuid import uuid4

import pytest

from delivery.fairness.rate_limit import RatePauses
from tests.support.clock import ManualClock

ONE, OTHER = uuid4(), uuid4()


def test_pause_ends_after_its_wait() -> None:
    clock = ManualClock(100.03)
    pauses = RatePauses(clock)

    [seconds] = pauses.pause([(ONE, 0.25)])

    assert 0.25 <= seconds <= 0.35
    assert pauses.is_paused(ONE)
    assert not pauses.is_paused(OTHER)
    clock.now += 0.24
    assert pauses.is_paused(ONE)
    clock.now = 100.03 + seconds
    assert not pauses.is_paused(ONE)


def test_pauses_end_at_common_ticks() -> None:
    pauses = RatePauses(ManualClock(100.03))
    ends = pauses.pause([(uuid4(), n / 1000) for n in range(1000)])
    assert len(ends) <= 11


def test_pause_is_at_most_one_second() -> None:
    [seconds] = RatePauses(ManualClock(100.03)).pause([(ONE, 1000.0)])
    assert seconds <= 1.1


def test_zero_wait_is_not_a_busy_loop() -> None:
    clock = ManualClock(100.03)
    for _ in range(50):
        [seconds] = RatePauses(clock).pause([(ONE, 0.0)])
        assert seconds > 0
        clock.now += seconds
    assert clock.now == pytest.approx(100.03 + 5, abs=0.2)


def test_later_pause_keeps_earlier_pause() -> None:
    clock = ManualClock(100.03)
    pauses = RatePauses(clock)
    pauses.pause([(ONE, 0.9)])
    clock.now += 0.5
    pauses.pause([(OTHER, 0.1)])
    assert pauses.is_paused(ONE)
    assert pauses.is_paused(OTHER)
