"""Runs several engine processes on one machine, as one process to stop and to watch.

Each engine is a new process, never a fork of a running loop, and equals a single `postrider
delivery`. The supervisor opens no database connection and delivers nothing.
"""

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import click
import structlog

from cli.metrics.http import MetricsAddress, serve_metrics
from cli.metrics.supervisor import SupervisorCollector
from cli.process.signals import stop_on_signals
from cli.process.supervisor_pipe import SupervisorEnd

_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 30.0
#: After this time the restart delay of an engine is reset.
_SETTLED_SECONDS = 60.0

log = structlog.get_logger()


async def supervise(count: int, metrics_address: MetricsAddress) -> int:
    """Run `count` engines until SIGTERM, let them drain, and return the exit code.

    The first engine starts alone, because wrong settings, a missing schema or an unreachable
    database would stop all of them. Its exit code is then returned. Later, an engine that ends is
    restarted after a growing delay. `metrics_address` serves the metrics of all engines.
    """
    engines = [_EngineProcess(number) for number in range(1, count + 1)]
    async with serve_metrics(metrics_address, SupervisorCollector(engines)):
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
    """One engine and its current process."""

    def __init__(self, number: int):
        self.number = number
        self._process: asyncio.subprocess.Process | None = None
        self._pipe: SupervisorEnd | None = None
        self.delivers = False

    async def start(self) -> None:
        """Start the process. Returns when it delivers or has ended."""
        # Kept open while the engine runs, because closing it stops the engine.
        self._pipe = SupervisorEnd()
        with self._pipe.engine_socket as engine_socket:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                # Not from the working directory, which may contain another `cli`.
                "-P",
                "-m",
                "cli.main",
                "delivery",
                "--processes=1",
                f"--lifeline={engine_socket.fileno()}",
                pass_fds=[engine_socket.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        log.info("engine_started", engine=self.number, pid=self._process.pid)
        self.delivers = await self._pipe.engine_delivers()

    async def ask(self) -> bytes | None:
        """Return its metrics, or None if it does not deliver or respond in time."""
        return await self._pipe.ask() if self._pipe is not None and self.delivers else None

    async def keep(self, stop: asyncio.Event) -> bool:
        """Restart it whenever it ends, until `stop`. Returns whether it then ended cleanly."""
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
        """Wait for the exit code. A negative number is the signal that ended it."""
        return await self._process.wait() if self._process is not None else 0

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _drain(self) -> bool:
        if self._pipe is not None:
            self._pipe.stop()
        return await self.exit_code() == 0

    def _forget(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
        self.delivers = False


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when one of these has ended, and cancel the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
