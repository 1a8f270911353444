"""What rounds in turn with a bare loop say: the machine's speed changes within seconds."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise


def rate_ratios(
    runs: Sequence[Mapping[str, float]], bare: Sequence[Mapping[str, float]]
) -> list[float]:
    """Of each run's `rate` to that of the bare loops right before and after it, of which there is
    one more."""
    return [
        run["rate"] / statistics.mean((before["rate"], after["rate"]))
        for run, (before, after) in zip(runs, pairwise(bare), strict=True)
    ]
