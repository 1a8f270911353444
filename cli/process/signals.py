"""Turns SIGTERM and SIGINT into a stop event. A second signal ends the process at once."""

import asyncio
import os
import signal
from collections.abc import Callable


def stop_on_signals(before_exit: Callable[[], None] = lambda: None) -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets. The second one ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signalled = False

    def on_signal(number: int) -> None:
        nonlocal signalled
        if signalled:
            before_exit()
            os._exit(128 + number)
        # Not the event, because other code may set it.
        signalled = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
