"""How much backlogs may let in beside others, and beside nobody."""

import pytest

from delivery.fairness.backlog_rate import BacklogRate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def let_in(allowance: BacklogRate, clock: Clock, seconds: float, others_a_second: int = 0) -> int:
    """What a config with an endless backlog gets, looked at every millisecond."""
    total, owed = 0, 1.0
    for _ in range(round(seconds * 1000)):
        clock.now += 0.001
        owed += others_a_second / 1000
        allowance.others_started(int(owed))
        owed -= int(owed)
        if not allowance.seconds_until_next():
            count = allowance.chunk_size()
            assert count is not None
            allowance.admitted(count)
            total += count
    return total


def test_backlog_alone_is_not_limited(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    assert allowance.chunk_size() is None
    allowance.admitted(1000)
    assert not allowance.seconds_until_next()


def test_limit_ends_soon_after_the_last_prompt_delivery(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(1)
    allowance.admitted(1000)
    assert allowance.seconds_until_next() > 1
    clock.now += 0.6
    assert not allowance.is_limited
    assert not allowance.seconds_until_next()


def test_lagging_loop_admits_minimum_plus_share_of_others(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    assert 50 <= let_in(allowance, clock, 2, others_a_second=4) / 2 <= 60
    assert 95 <= let_in(allowance, clock, 2, others_a_second=200) / 2 <= 110
    assert 500 <= let_in(allowance, clock, 2, others_a_second=2000) / 2 <= 650


def test_punctual_loop_raises_the_rate(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    for _ in range(2000):
        allowance.aimd.observe(0.0)
    assert let_in(allowance, clock, 1, others_a_second=10) > 5000


def test_unused_rate_is_not_saved_up(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(100_000)
    clock.now += 0.4
    assert 4 <= let_in(allowance, clock, 0.09) <= 25


def test_chunk_grows_with_the_rate(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(1)
    assert allowance.chunk_size() == 8
    for _ in range(2000):
        allowance.aimd.observe(0.0)
    assert allowance.chunk_size() == 300
