"""Turns SIGTERM and Ctrl-C into an event; the second one gives up waiting."""

import asyncio
import os
import signal
from collections.abc import Callable


def stop_on_signals(before_giving_up: Callable[[], None] = lambda: None) -> asyncio.Event:
    """An event set by the first SIGTERM or SIGINT; another ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signalled = False

    def on_signal(number: int) -> None:
        nonlocal signalled
        if signalled:
            before_giving_up()
            os._exit(128 + number)
        # Not by the event, which somebody else may have set.
        signalled = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
