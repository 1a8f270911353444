"""What an engine remembers of rates that are used up."""

from uuid import uuid4

import pytest

from delivery.fairness.rate_limit import RatePauses

ONE, OTHER = uuid4(), uuid4()


class Clock:
    def __init__(self) -> None:
        self.now = 100.03

    def __call__(self) -> float:
        return self.now


def test_a_config_is_paused_until_its_wait_is_over_and_the_others_are_not() -> None:
    clock = Clock()
    pauses = RatePauses(clock)

    [seconds] = pauses.pause([(ONE, 0.25)])

    assert 0.25 <= seconds <= 0.35
    assert pauses.is_paused(ONE)
    assert not pauses.is_paused(OTHER)
    clock.now += 0.24
    assert pauses.is_paused(ONE)
    clock.now = 100.03 + seconds
    assert not pauses.is_paused(ONE)


def test_holds_of_many_configs_end_together_so_that_asking_is_bounded() -> None:
    pauses = RatePauses(Clock())
    ends = pauses.pause([(uuid4(), n / 1000) for n in range(1000)])
    assert len(ends) <= 11


def test_nobody_is_paused_for_long_since_a_limit_may_be_raised() -> None:
    [seconds] = RatePauses(Clock()).pause([(ONE, 1000.0)])
    assert seconds <= 1.1


def test_even_a_wait_of_nothing_is_no_busy_loop() -> None:
    clock = Clock()
    for _ in range(50):
        [seconds] = RatePauses(clock).pause([(ONE, 0.0)])
        assert seconds > 0
        clock.now += seconds
    assert clock.now == pytest.approx(100.03 + 5, abs=0.2)


def test_a_later_hold_of_another_config_ends_no_hold() -> None:
    clock = Clock()
    pauses = RatePauses(clock)
    pauses.pause([(ONE, 0.9)])
    clock.now += 0.5
    pauses.pause([(OTHER, 0.1)])
    assert pauses.is_paused(ONE)
    assert pauses.is_paused(OTHER)
