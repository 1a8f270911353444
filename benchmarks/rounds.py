"""Compares rounds with bare loops in turn, because the speed of a machine changes."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise


def rate_ratios(
    runs: Sequence[Mapping[str, float]], bare: Sequence[Mapping[str, float]]
) -> list[float]:
    """Return the ratio of each run's `rate` to that of the bare loops right before and after it.

    There is one bare loop more than runs.
    """
    return [
        run["rate"] / statistics.mean((before["rate"], after["rate"]))
        for run, (before, after) in zip(runs, pairwise(bare), strict=True)
    ]
