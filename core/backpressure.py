"""AIMD on event-loop lag: a process slows low-priority work while its timers run late.

Where CPU cores are short, the work of one flooding client delays the work of all others. Event-loop
lag shows this first: timers fire late because the loop waits for a core or is busy. So a late timer
halves the level of the low-priority work, and each punctual timer raises it.
"""

import asyncio
from time import monotonic

#: A timer that fires later than this is late. With idle cores almost none is.
_LATE_SECONDS = 0.0025
_DECREASE = 0.5
#: Growth per punctual timer. It increases by the minimum after each 500 punctual timers in a row.
#: The level settles where about one timer in 500 is late.
_GROWTH_MIN, _GROWTH_MAX = 0.001, 0.01
_TIMERS_PER_GROWTH_STEP = 500

_TIMER_SECONDS = 0.01
#: Measuring continues this long after the last call of `measure`.
_LINGER_SECONDS = 0.25
#: After a break of this length the level starts again at its minimum.
_STALE_SECONDS = 2.0


class AimdLevel:
    """A level between `minimum`, where it starts, and `maximum`. Pure: no I/O, no clock."""

    def __init__(self, minimum: float, maximum: float):
        self._minimum = minimum
        self._maximum = maximum
        self.level = minimum
        self._punctual_timers = 0

    def reset(self) -> None:
        self.level = self._minimum
        self._punctual_timers = 0

    def observe(self, lag_seconds: float) -> None:
        """Lower or raise the level after a timer that fired `lag_seconds` late."""
        if lag_seconds > _LATE_SECONDS:
            self._punctual_timers = 0
            self.level = max(self.level * _DECREASE, self._minimum)
        else:
            self._punctual_timers += 1
            steps = 1 + self._punctual_timers / _TIMERS_PER_GROWTH_STEP
            growth = min(_GROWTH_MIN * steps, _GROWTH_MAX)
            self.level = min(self.level * (1 + growth), self._maximum)


class LoopLag:
    """Measures the lag of the running event loop with short timers and reports it to a level."""

    def __init__(self, level: AimdLevel):
        self._level = level
        self._measure_until = 0.0
        self._due_at = 0.0
        self.is_measuring = False

    def measure(self) -> None:
        """Measure from now on for a quarter of a second. Call it again to continue."""
        self._measure_until = monotonic() + _LINGER_SECONDS
        if not self.is_measuring:
            if monotonic() > self._due_at + _STALE_SECONDS:
                self._level.reset()
            self._start_timer()

    def _start_timer(self) -> None:
        self.is_measuring = True
        self._due_at = monotonic() + _TIMER_SECONDS
        asyncio.get_running_loop().call_later(_TIMER_SECONDS, self._timer_fired)

    def _timer_fired(self) -> None:
        self.is_measuring = False
        now = monotonic()
        self._level.observe(max(now - self._due_at, 0.0))
        if now < self._measure_until:
            self._start_timer()
