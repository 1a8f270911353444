"""The listener: wakes the engine for near retries, and keeps no timer for later ones."""

import asyncio
import gc
from typing import Any

from delivery.listen import Listener

NO_POOL: Any = None


async def test_wake_in_ends_wait_early() -> None:
    listener = Listener(NO_POOL, poll_seconds=60)
    listener.wake_in(0.01)
    async with asyncio.timeout(10):
        await listener.wait()


async def test_late_wakeups_create_no_timers() -> None:
    listener = Listener(NO_POOL, poll_seconds=1)
    before = _timers()
    for _ in range(1000):
        listener.wake_in(3600)
    assert _timers() <= before


def _timers() -> int:
    return sum(isinstance(thing, asyncio.TimerHandle) for thing in gc.get_objects())
