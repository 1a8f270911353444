"""Rounds in turn with a bare loop."""

import pytest

from benchmarks.rounds import rate_ratios


def test_rate_ratio_uses_the_bare_loops_around_a_run() -> None:
    runs = [{"rate": 30.0}, {"rate": 10.0}]
    bare = [{"rate": 10.0}, {"rate": 20.0}, {"rate": 60.0}]
    assert rate_ratios(runs, bare) == [2.0, 0.25]


def test_rate_ratio_needs_one_more_bare_loop() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rate_ratios([{"rate": 1.0}], [{"rate": 1.0}])
