"""Rounds in turn with a bare loop."""

import pytest

from benchmarks.rounds import rate_ratios


def test_each_run_is_compared_with_the_bare_loops_around_it() -> None:
    runs = [{"rate": 30.0}, {"rate": 10.0}]
    bare = [{"rate": 10.0}, {"rate": 20.0}, {"rate": 60.0}]
    assert rate_ratios(runs, bare) == [2.0, 0.25]


def test_a_bare_loop_too_few_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="shorter"):
        rate_ratios([{"rate": 1.0}], [{"rate": 1.0}])
