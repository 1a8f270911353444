"""How far a process holds itself back for the sake of others, by how late its event loop is (pure).

Where cores are short, what is done for one who floods us is in the way of all others, at every
step on their path. The loop notices it first: its timers come late, whether it had to wait for a
core or was at something long itself. So what may wait is halved with each timer that is late, and
grows a little with each that is not, the faster the longer none was late: as much as fits, on
whatever machine, beside whomever.
"""

import asyncio
from time import monotonic

#: A timer that comes later than this is late: on machines with cores to spare hardly one does.
_LATE_SECONDS = 0.0025
#: What a late timer leaves, and what timely ones add: the first a part in a thousand, as much again
#: after each 500, and ten at most. All in proportion: they are in balance when about one timer in
#: 500 is late, however much is being done then.
_LATE = 0.5
_TIMELY, _TIMELY_MOST = 0.001, 0.01
_AS_MUCH_AGAIN = 500


class AimdLevel:
    """A level from `least`, where it begins and nobody is stopped altogether, up to `most`."""

    def __init__(self, least: float, most: float):
        self._least = least
        self._most = most
        self.level = least
        self._timely = 0

    def reset(self) -> None:
        """What was felt is long ago."""
        self.level = self._least
        self._timely = 0

    def felt(self, late_seconds: float) -> None:
        """A timer of the loop came so late."""
        if late_seconds > _LATE_SECONDS:
            self._timely = 0
            self.level = max(self.level * _LATE, self._least)
        else:
            self._timely += 1
            growth = min(_TIMELY * (1 + self._timely / _AS_MUCH_AGAIN), _TIMELY_MOST)
            self.level = min(self.level * (1 + growth), self._most)


# How late the event loop is: a timer at short distances, for as long as somebody wants to know.

_INTERVAL_SECONDS = 0.01
#: It goes on for so long after it was wanted last.
_LINGER_SECONDS = 0.25
#: What was told so long ago says nothing of now.
_STALE_SECONDS = 2.0


class LoopLag:
    """Tells a restraint of every timer how late it came."""

    def __init__(self, level: AimdLevel):
        self._restraint = level
        self._wanted_until = 0.0
        self._due = 0.0
        self.is_timing = False

    def want(self) -> None:
        """Listen now, and for a moment more."""
        self._wanted_until = monotonic() + _LINGER_SECONDS
        if not self.is_timing:
            if monotonic() > self._due + _STALE_SECONDS:
                self._restraint.reset()
            self._wait()

    def _wait(self) -> None:
        self.is_timing = True
        self._due = monotonic() + _INTERVAL_SECONDS
        asyncio.get_running_loop().call_later(_INTERVAL_SECONDS, self._look)

    def _look(self) -> None:
        self.is_timing = False
        now = monotonic()
        self._restraint.felt(max(now - self._due, 0.0))
        if now < self._wanted_until:
            self._wait()
