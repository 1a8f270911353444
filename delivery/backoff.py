"""When the next automatic attempt is due, or that there is none (pure)."""

from collections.abc import Callable, Sequence

#: A retry comes up to this much later than its schedule says, never earlier: receivers that failed
#: together are not called again together.
JITTER = 0.2

#: What a fault of ours waits for is our own recovery, which takes moments or an operator.
_FAULT_SECONDS = 1.0
_FAULT_SECONDS_MAX = 900.0


def backoff_schedule(
    operator_schedule: Sequence[float], max_retries: int, own_schedule: Sequence[float]
) -> tuple[float, ...]:
    """The waits in seconds before each retry of a webhook config, one entry a retry.

    Its own schedule is taken as it is; the operator's is cut or its last wait repeated to give
    `max_retries` entries.
    """
    if own_schedule:
        return tuple(own_schedule)
    last = operator_schedule[-1]
    padding = (last,) * (max_retries - len(operator_schedule))
    return (*operator_schedule, *padding)[:max_retries]


def next_backoff(
    schedule: Sequence[float], attempts_made: int, random: Callable[[], float]
) -> float | None:
    """Seconds until the next attempt after `attempts_made` (≥ 1) attempts; None: give up."""
    if attempts_made > len(schedule):
        return None
    return schedule[attempts_made - 1] * (1 + JITTER * random())


def fault_backoff(faults: int, retries: int, random: Callable[[], float]) -> float | None:
    """Seconds until the next attempt after `faults` (≥ 1) that were broken by us; None: give up."""
    if faults > retries:
        return None
    # Their number has no bound that keeps a power of it small.
    wait = min(_FAULT_SECONDS * 2.0 ** min(faults - 1, 20), _FAULT_SECONDS_MAX)
    return wait * (1 + JITTER * random())
