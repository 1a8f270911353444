"""The admission rate of a backlog, with and without prompt deliveries of others."""

import pytest

from delivery.fairness.backlog_rate import BacklogRate
from tests.support.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def rate(clock: ManualClock) -> BacklogRate:
    return BacklogRate(clock)


def admit(rate: BacklogRate, clock: ManualClock, seconds: float, others_per_second: int = 0) -> int:
    """Admit an endless backlog every millisecond, and return the number of deliveries."""
    total, others = 0, 1.0
    for _ in range(round(seconds * 1000)):
        clock.now += 0.001
        others += others_per_second / 1000
        rate.others_started(int(others))
        others -= int(others)
        if not rate.seconds_until_next():
            count = rate.chunk_size()
            assert count is not None
            rate.admitted(count)
            total += count
    return total


def test_backlog_alone_is_not_limited(rate: BacklogRate) -> None:
    assert rate.chunk_size() is None
    rate.admitted(1000)
    assert not rate.seconds_until_next()


def test_limit_ends_soon_after_the_last_prompt_delivery(
    rate: BacklogRate, clock: ManualClock
) -> None:
    rate.others_started(1)
    rate.admitted(1000)
    assert rate.seconds_until_next() > 1
    clock.now += 0.6
    assert not rate.is_limited
    assert not rate.seconds_until_next()


def test_lagging_loop_admits_minimum_plus_share_of_others(
    rate: BacklogRate, clock: ManualClock
) -> None:
    assert 50 <= admit(rate, clock, 2, others_per_second=4) / 2 <= 60
    assert 95 <= admit(rate, clock, 2, others_per_second=200) / 2 <= 110
    assert 500 <= admit(rate, clock, 2, others_per_second=2000) / 2 <= 650


def test_punctual_loop_raises_the_rate(rate: BacklogRate, clock: ManualClock) -> None:
    for _ in range(2000):
        rate.aimd.observe(0.0)
    assert admit(rate, clock, 1, others_per_second=10) > 5000


def test_unused_rate_is_not_saved_up(rate: BacklogRate, clock: ManualClock) -> None:
    rate.others_started(100_000)
    clock.now += 0.4
    assert 4 <= admit(rate, clock, 0.09) <= 25


def test_chunk_grows_with_the_rate(rate: BacklogRate) -> None:
    rate.others_started(1)
    assert rate.chunk_size() == 8
    for _ in range(2000):
        rate.aimd.observe(0.0)
    assert rate.chunk_size() == 300
