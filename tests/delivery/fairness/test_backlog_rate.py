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


def test_beside_nobody_there_is_no_bound(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    assert allowance.chunk_size() is None
    allowance.admitted(1000)
    assert not allowance.seconds_until_next()


def test_the_bound_ends_soon_after_the_last_of_the_others(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(1)
    allowance.admitted(1000)
    assert allowance.seconds_until_next() > 1
    clock.now += 0.6
    assert not allowance.is_limited
    assert not allowance.seconds_until_next()


def test_a_late_loop_lets_in_the_least_and_some_for_each_of_the_others(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    assert 50 <= let_in(allowance, clock, 2, others_a_second=4) / 2 <= 60
    assert 95 <= let_in(allowance, clock, 2, others_a_second=200) / 2 <= 110
    assert 500 <= let_in(allowance, clock, 2, others_a_second=2000) / 2 <= 650


def test_a_punctual_loop_lets_in_more_and_more(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    for _ in range(2000):
        allowance.aimd.observe(0.0)
    assert let_in(allowance, clock, 1, others_a_second=10) > 5000


def test_what_was_not_used_is_not_saved_up(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(100_000)
    clock.now += 0.4
    assert 4 <= let_in(allowance, clock, 0.09) <= 25


def test_a_chunk_grows_with_the_rate(clock: Clock) -> None:
    allowance = BacklogRate(clock)
    allowance.others_started(1)
    assert allowance.chunk_size() == 8
    for _ in range(2000):
        allowance.aimd.observe(0.0)
    assert allowance.chunk_size() == 300
