"""The event loop that a client lives on, as its gRPC channel does, and what it says on another.

There gRPC sends the call all the same and then loses its answer, and a publisher's wait may never
end: what was accepted is reported as failed, or nothing is.
"""

import asyncio
from collections.abc import Callable
from functools import wraps
from typing import Any

from postrider_client.errors import WrongEventLoop

_ADVICE = (
    "make one client for each event loop, inside of it (in the coroutine that asyncio.run is "
    "given, say); from another thread, use asyncio.run_coroutine_threadsafe"
)


class HomeLoop:
    """The loop it is made on."""

    def __init__(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongEventLoop(f"no event loop is running: {_ADVICE}") from None

    def require(self) -> None:
        """WrongEventLoop unless this runs on the loop; nothing has been sent then."""
        if asyncio.get_running_loop() is not self._loop:
            raise WrongEventLoop(f"this client or publisher was made on another loop: {_ADVICE}")

    def keep[Stub](self, stub: Stub) -> Stub:
        """The stub, every call of which requires the loop. An interceptor runs too late for it."""
        for name, call in vars(stub).items():
            setattr(stub, name, self._kept(call))
        return stub

    def _kept(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.require()
            return call(*args, **kwargs)

        return checked
