"""Ending of tasks that run for as long as their process."""

import asyncio
from collections.abc import Collection
from typing import Any

_CANCEL_AGAIN_SECONDS = 0.5


async def cancel_at(deadline: float, task: asyncio.Task[Any]) -> None:
    """Wait for the task until `deadline` (loop time), then cancel it.

    `asyncio.timeout` around a statement would also wait until its connection is released.
    """
    remaining = deadline - asyncio.get_running_loop().time()
    await asyncio.wait({task}, timeout=max(remaining, 0))
    await cancel_and_wait([task])


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they are done.

    Cancels repeatedly, because a connection that breaks during the cancellation of its statement
    raises an error that can replace the CancelledError.
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
