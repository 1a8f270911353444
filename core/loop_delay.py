"""How late the event loop is: a timer at short distances, for as long as somebody wants to know."""

import asyncio
from collections.abc import Callable
from time import monotonic

_INTERVAL_SECONDS = 0.01
#: It goes on for so long after it was wanted last.
_LINGER_SECONDS = 0.25


class LoopDelay:
    """Tells `felt` of every timer how late it came."""

    def __init__(self, felt: Callable[[float], None]):
        self._felt = felt
        self._wanted_until = 0.0
        self._due = 0.0
        self.is_timing = False

    def want(self) -> None:
        """Listen now, and for a moment more."""
        self._wanted_until = monotonic() + _LINGER_SECONDS
        if not self.is_timing:
            self._wait()

    def _wait(self) -> None:
        self.is_timing = True
        self._due = monotonic() + _INTERVAL_SECONDS
        asyncio.get_running_loop().call_later(_INTERVAL_SECONDS, self._look)

    def _look(self) -> None:
        self.is_timing = False
        now = monotonic()
        self._felt(max(now - self._due, 0.0))
        if now < self._wanted_until:
            self._wait()
