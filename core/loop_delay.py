"""How late the event loop is: a timer at short distances, for as long as somebody wants to know."""

import asyncio
from time import monotonic

from core.restraint import Restraint

_INTERVAL_SECONDS = 0.01
#: It goes on for so long after it was wanted last.
_LINGER_SECONDS = 0.25
#: What was told so long ago says nothing of now.
_STALE_SECONDS = 2.0


class LoopDelay:
    """Tells a restraint of every timer how late it came."""

    def __init__(self, restraint: Restraint):
        self._restraint = restraint
        self._wanted_until = 0.0
        self._due = 0.0
        self.is_timing = False

    def want(self) -> None:
        """Listen now, and for a moment more."""
        self._wanted_until = monotonic() + _LINGER_SECONDS
        if not self.is_timing:
            if monotonic() > self._due + _STALE_SECONDS:
                self._restraint.begin_anew()
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
