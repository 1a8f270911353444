"""Checks that a client is used on the event loop that created it.

On another loop gRPC sends the call but loses the response, and a publisher can wait without end.
"""

import asyncio
from collections.abc import Callable
from functools import wraps
from typing import Any

from postrider_client.errors import WrongEventLoop

_ADVICE = (
    "create one client per event loop, in the coroutine given to asyncio.run; from another thread "
    "use asyncio.run_coroutine_threadsafe"
)


class LoopGuard:
    """Remembers the loop that it was created on. Raises WrongEventLoop without one."""

    def __init__(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongEventLoop(f"no event loop is running: {_ADVICE}") from None

    def check(self) -> None:
        """Raise WrongEventLoop on another loop. Call it before anything is sent."""
        if asyncio.get_running_loop() is not self._loop:
            raise WrongEventLoop(f"the client was created on another event loop: {_ADVICE}")

    def guard[Stub](self, stub: Stub) -> Stub:
        """Make every call of a stub check the loop. An interceptor would run too late."""
        for name, call in vars(stub).items():
            setattr(stub, name, self._guarded(call))
        return stub

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return call(*args, **kwargs)

        return checked
