"""Runs the `postrider` command as real processes and reads their logs."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import orjson

from tests.support.platform import ENCRYPTION_KEYS, ISSUER, Platform

POSTRIDER = Path(sys.executable).with_name("postrider")
AMPLE = 30.0


class Process:
    """A `postrider` process. `log` has the lines of stderr, parsed if they are JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._grown = asyncio.Condition()
        self._ended = False
        self._reading = asyncio.create_task(self._read())
        self.lines: list[str] = []
        self.log: list[dict[str, Any]] = []

    def named(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry["event"] == event]

    async def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for this many log entries of a name. Returns them."""
        async with asyncio.timeout(AMPLE), self._grown:
            await self._grown.wait_for(lambda: len(self.named(event)) >= count or self._ended)
        entries = self.named(event)
        assert len(entries) >= count, f"it ended early: {self.lines[-5:]}"
        return entries

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        await self.exit_code()

    async def exit_code(self) -> int:
        async with asyncio.timeout(AMPLE):
            # Shielded, so that a timeout of one caller does not cancel the task for the next.
            await asyncio.shield(self._reading)
            return await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.returncode is None

    def peak_megabytes(self) -> float:
        """The peak memory of the process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024

    async def _read(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        async for line in stream:
            async with self._grown:
                self.lines.append(line.decode().rstrip())
                with suppress(orjson.JSONDecodeError):
                    self.log.append(orjson.loads(line))
                self._grown.notify_all()
        async with self._grown:
            self._ended = True
            self._grown.notify_all()


class Processes:
    """Starts processes on one database and stops all of them at the end."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.started: list[Process] = []

    async def start(self, *command: str, under: Sequence[str] = (), **settings: Any) -> Process:
        """Start a subcommand. `settings` have no prefix, and None removes a setting.

        `under` is a command that runs it, as `prlimit` does.
        """
        environment = {"PATH": os.environ["PATH"], **self.environment}
        for name, value in settings.items():
            environment[f"WEBHOOK_{name.upper()}"] = str(value)
            if value is None:
                del environment[f"WEBHOOK_{name.upper()}"]
        process = Process(
            await asyncio.create_subprocess_exec(
                *under,
                POSTRIDER,
                *command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=2**20,
            )
        )
        self.started.append(process)
        return process

    async def engine(self, *, under: Sequence[str] = (), **settings: Any) -> Process:
        """Start a delivery engine and wait until it is ready."""
        process = await self.start("delivery", under=under, **settings)
        await process.wait_for("delivering")
        return process

    async def server(self, **settings: Any) -> tuple[Process, str]:
        """Start a gRPC server on a free port. Returns it and its address."""
        process = await self.start("server", **settings)
        [entry] = await process.wait_for("serving")
        return process, f"127.0.0.1:{entry['port']}"

    async def kill_all(self) -> None:
        await asyncio.gather(*(process.kill() for process in self.started))


def environment_of(database_url: str, ca_file: Path, public_key_file: Path) -> dict[str, str]:
    """The settings of `server` and `delivery`. Receivers on loopback are allowed."""
    return {
        "WEBHOOK_DATABASE_URL": database_url,
        "WEBHOOK_ENCRYPTION_KEYS": ENCRYPTION_KEYS,
        "WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
        "WEBHOOK_ALLOWED_PORTS": "1-65535",
        "WEBHOOK_CA_FILE": str(ca_file),
        "WEBHOOK_JWT_ISSUER": ISSUER,
        "WEBHOOK_JWT_PUBLIC_KEY_FILE": str(public_key_file),
        "WEBHOOK_LISTEN_ADDRESS": "127.0.0.1:0",
        "WEBHOOK_ADMIN_ADDRESS": "off",
        "WEBHOOK_SERVER_METRICS_ADDRESS": "off",
        "WEBHOOK_DELIVERY_METRICS_ADDRESS": "off",
        "WEBHOOK_LOG_FORMAT": "json",
    }


@asynccontextmanager
async def talking_to(address: str, platform: Platform) -> AsyncIterator[Platform]:
    """The stubs and tokens of `platform`, for the server at another address."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield Platform(address, platform.key, platform.settings, channel)
