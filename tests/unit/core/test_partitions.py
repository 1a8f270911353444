"""How far the partitions of a table reach, without a gap."""

from datetime import UTC, datetime, timedelta

import pytest

from core.partitions import days_covered

MIDNIGHT = datetime(2026, 5, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("days", "ahead"),
    [([], 0), ([0], 0), (range(8), 7), (range(-3, 8), 7), ([1, 2], 0), ([0, 1, 3], 1)],
    ids=str,
)
def test_days_ahead_are_counted_up_to_the_first_gap(days: list[int], ahead: int) -> None:
    ranges = [(MIDNIGHT + timedelta(days=day), MIDNIGHT + timedelta(days=day + 1)) for day in days]

    assert days_covered(ranges, MIDNIGHT + timedelta(hours=12)) == ahead
    assert days_covered(reversed(ranges), MIDNIGHT + timedelta(hours=12)) == ahead
