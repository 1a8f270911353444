"""Keeps several engine processes of this machine delivering, as one process to stop and to watch.

The engines are programs started anew, never forks of a running loop, and each is exactly what
`postrider delivery` is by itself. The supervisor opens no database connection and delivers nothing.
"""

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import click
import structlog

from cli.metrics.http import Place, listening
from cli.metrics.supervisor import SupervisorCollector
from cli.process.signals import stop_on_signals
from cli.process.supervisor_pipe import SupervisorEnd

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0
#: An engine that lived so long died of something new.
_SETTLED_SECONDS = 60.0

log = structlog.get_logger()


async def supervise(count: int, place: Place) -> int:
    """Keep `count` engines delivering until SIGTERM, then let them drain; returns the exit code.

    The first starts alone. What keeps it from delivering (settings, the schema, the database) would
    keep the others from it, too, so its exit code is ours then and nothing is tried again. From
    then on an engine that ends is started anew, after a delay that grows while it keeps ending.
    The metrics of all of them are at `place`.
    """
    engines = [_EngineProcess(number) for number in range(1, count + 1)]
    async with listening(place, SupervisorCollector(engines)):
        return await _keep_all(engines)


async def _keep_all(engines: Sequence["_EngineProcess"]) -> int:

    def kill_all() -> None:
        for engine in engines:
            engine.kill()

    stop = stop_on_signals(kill_all)
    await _first(engines[0].start(), stop.wait())
    if not engines[0].delivers and not stop.is_set():
        code = await engines[0].exit_code()
        click.echo(
            f"postrider: the first engine process ended ({code}) before it delivered; the reason"
            " is above, and no other was started",
            err=True,
        )
        return max(code, 1)
    async with asyncio.TaskGroup() as group:
        keeping = [group.create_task(engine.keep(stop)) for engine in engines]
    return 0 if all(task.result() for task in keeping) else 1


class _EngineProcess:
    """One engine, through all the processes it takes."""

    def __init__(self, number: int):
        self.number = number
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: SupervisorEnd | None = None
        self.delivers = False

    async def start(self) -> None:
        """Start it; returns once it delivers, or when it ended before."""
        # Kept as long as the engine lives, since closing it tells the engine to stop.
        self._lifeline = SupervisorEnd()
        with self._lifeline.theirs as theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Not from the working directory, which may hold another `cli`.
                "-P",
                "-m",
                "cli.main",
                "delivery",
                "--processes=1",
                f"--lifeline={theirs.fileno()}",
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        log.info("engine_started", engine=self.number, pid=self._process.pid)
        self.delivers = await self._lifeline.engine_delivers()

    async def ask(self) -> bytes | None:
        """What it answers; None while it does not deliver, or when it does not answer in time."""
        return await self._lifeline.ask() if self._lifeline is not None and self.delivers else None

    async def keep(self, stop: asyncio.Event) -> bool:
        """Start it anew whenever it ends, until `stop`; returns whether it then ended cleanly."""
        delay = _FIRST_DELAY_SECONDS
        while not stop.is_set():
            if self._process is None:
                await _first(self.start(), stop.wait())
            began = monotonic()
            await _first(self.exit_code(), stop.wait())
            if stop.is_set():
                break
            if monotonic() - began > _SETTLED_SECONDS:
                delay = _FIRST_DELAY_SECONDS
            code = await self.exit_code()
            log.error("engine_ended", engine=self.number, exit_code=code, restart_seconds=delay)
            self._forget()
            await _first(asyncio.sleep(delay), stop.wait())
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
        return await self._drain()

    async def exit_code(self) -> int:
        """The exit code once it has ended; a signal's number, negative, when one ended it."""
        return await self._process.wait() if self._process is not None else 0

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _drain(self) -> bool:
        if self._lifeline is not None:
            self._lifeline.stop()
        return await self.exit_code() == 0

    def _forget(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
        self._process = self._lifeline = None
        self.delivers = False


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when one of these has ended, and give up the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
