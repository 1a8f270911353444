"""When the next attempt is due: schedules, jitter and the backoff of internal errors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delivery.decide import JITTER, backoff_schedule, internal_error_backoff, next_backoff
from delivery.settings import DeliverySettings

WAITS = st.floats(min_value=0.001, max_value=86_400)
SCHEDULES = st.lists(WAITS, min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("operator", "max_retries", "own", "expected"),
    [
        ((1.0, 10.0, 60.0), 3, (), (1.0, 10.0, 60.0)),
        ((1.0, 10.0, 60.0), 2, (), (1.0, 10.0)),
        ((1.0, 10.0, 60.0), 0, (), ()),
        ((1.0, 10.0, 60.0), 5, (), (1.0, 10.0, 60.0, 60.0, 60.0)),
        ((7.0,), 2, (), (7.0, 7.0)),
        # The length of a config's own schedule replaces max_retries.
        ((1.0, 10.0, 60.0), 3, (5.0,), (5.0,)),
        ((1.0,), 1, (2.0, 3.0, 4.0), (2.0, 3.0, 4.0)),
        ((1.0,), 0, (2.0,), (2.0,)),
    ],
)
def test_schedule_has_one_entry_per_retry(
    operator: tuple[float, ...],
    max_retries: int,
    own: tuple[float, ...],
    expected: tuple[float, ...],
) -> None:
    assert backoff_schedule(operator, max_retries, own) == expected


@given(SCHEDULES, st.integers(0, 20))
def test_operator_schedule_has_max_retries_entries(operator: list[float], max_retries: int) -> None:
    schedule = backoff_schedule(operator, max_retries, ())
    assert len(schedule) == max_retries
    assert list(schedule[: len(operator)]) == operator[:max_retries]
    assert set(schedule[len(operator) :]) <= {operator[-1]}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [((1.0, 10.0, 60.0), [1.0, 10.0, 60.0, None, None]), ((), [None])],
)
def test_backoff_follows_the_schedule_to_its_end(
    schedule: tuple[float, ...], expected: list[float | None]
) -> None:
    attempts = range(1, len(expected) + 1)
    assert [next_backoff(schedule, made, lambda: 0.0) for made in attempts] == expected


@given(SCHEDULES, st.integers(1, 20), st.floats(0, 1, exclude_max=True))
def test_jitter_adds_at_most_a_fifth(
    schedule: list[float], attempts_made: int, chance: float
) -> None:
    wait = next_backoff(schedule, attempts_made, lambda: chance)
    if attempts_made > len(schedule):
        assert wait is None
    else:
        planned = schedule[attempts_made - 1]
        assert wait is not None
        assert planned <= wait <= planned * (1 + JITTER)


def test_jitter_spreads_retries() -> None:
    chances = iter((0.0, 0.5, 0.9))
    assert len({next_backoff((10.0,), 1, lambda: next(chances)) for _ in range(3)}) == 3


def test_internal_error_backoff_doubles_up_to_15_minutes() -> None:
    waits = [internal_error_backoff(faults, 300, lambda: 0.0) for faults in range(1, 13)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_internal_errors_end_delivery_after_max_retries(
    faults: int, retries: int, chance: float
) -> None:
    wait = internal_error_backoff(faults, retries, lambda: chance)
    if faults > retries:
        assert wait is None
    else:
        assert wait is not None
        assert 1 <= wait <= 900 * (1 + JITTER)


def test_internal_errors_are_retried_for_three_days() -> None:
    retries = DeliverySettings().max_fault_retries
    waits = [
        internal_error_backoff(faults, retries, lambda: 0.0) or 0.0
        for faults in range(1, retries + 1)
    ]
    assert 3 <= sum(waits) / 86_400 < 3.1
