"""How tasks that run for as long as a process does come to their end."""

import asyncio
from collections.abc import Collection
from typing import Any

_AGAIN_SECONDS = 0.5


async def end_by(deadline: float, task: asyncio.Task[Any]) -> None:
    """Wait for it until then, by the loop's time, and then for no longer.

    A timeout around a statement would go on waiting, for the connection to be given back.
    """
    rest = deadline - asyncio.get_running_loop().time()
    await asyncio.wait({task}, timeout=max(rest, 0))
    await end([task])


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel them until they are done: a connection that breaks while a statement is given up
    raises an error of its own, which may take the place of the cancellation."""
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_AGAIN_SECONDS)
