"""The whole path as in production: separate processes for server, engine and receiver."""

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from benchmarks.ledger import Ledger, Receipt
from benchmarks.paced_publisher import Orders
from benchmarks.stack import (
    Stack,
    cpu_seconds,
    cpu_seconds_of_postgres,
    free_port,
    receiver_certificate,
    wait_until_listening,
)

_PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.02
_ENGINES_LISTEN = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'postrider-delivery' AND query LIKE 'LISTEN%'
"""


@dataclass
class Pipeline:
    """The running processes. `connection` is for the benchmark."""

    stack: Stack
    connection: asyncpg.Connection
    ledger: Ledger
    server_port: int
    receiver_port: int
    processes: Mapping[str, "subprocess.Popen[bytes]"]

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds of each process."""
        used = {name: cpu_seconds(process.pid) for name, process in self.processes.items()}
        return used | {"postgres": cpu_seconds_of_postgres(self.stack.postgres.process.pid)}

    async def publish(self, **orders: Any) -> dict[str, float]:
        """Run a publisher, and return its accepted events, its time and its CPU seconds."""
        full = Orders(
            port=self.server_port,
            token=self.stack.token("events:publish"),
            ledger=str(self.stack.directory / "ledger"),
            **orders,
        )
        with self.stack.process("benchmarks.paced_publisher", full.as_argument()) as process:
            published = await self.stack.output(process)
        figures: dict[str, float] = json.loads(published)
        return figures

    async def deliver(self, **orders: Any) -> tuple[list[Receipt], float]:
        """Publish, wait for a receipt of every event, and return them with the publisher's CPU.

        Raises RuntimeError for a duplicate, because such a run is not comparable.
        """
        start = len(self.ledger)
        published = await self.publish(**orders)
        await self.received(start + int(published["accepted"]))
        receipts = self.ledger.since(start)
        if len({receipt.sequence for receipt in receipts}) != published["accepted"]:
            raise RuntimeError(
                f"{published['accepted']} events were accepted, and others came in "
                f"{len(receipts)} requests"
            )
        return receipts, published["cpu"]

    async def received(self, count: int) -> None:
        """Return when the receiver has this many receipts."""
        await self._until(lambda: len(self.ledger) >= count, f"{count} receipts")

    async def settled(self) -> None:
        """Return when the queue is empty."""
        while await self.connection.fetchval("SELECT EXISTS (SELECT 1 FROM delivery_queue)"):
            self._require_alive()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            self._require_alive()
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no {what} within {_PATIENCE_SECONDS:.0f} s; there are {len(self.ledger)}"
                )
            await asyncio.sleep(_LOOK_SECONDS)

    def _require_alive(self) -> None:
        for name, process in self.processes.items():
            if (code := process.poll()) is not None:
                raise RuntimeError(f"the {name} ended with {code}; what it said is above")


@asynccontextmanager
async def running_server_and_receiver(
    stack: Stack, capacity: int = 2_000_000
) -> AsyncIterator[Pipeline]:
    """Start it without an engine. The ledger holds `capacity` receipts."""
    ports = free_port(), free_port()
    ledger = Ledger.create(stack.directory / "ledger", capacity)
    async with AsyncExitStack() as cleanup:
        connection = await asyncpg.connect(stack.database_url)
        cleanup.push_async_callback(connection.close)
        certificate = str(receiver_certificate(stack))
        arguments = (str(ports[1]), certificate, str(stack.directory / "ledger"))
        receiver = cleanup.enter_context(stack.process("benchmarks.receiver", *arguments))
        server = cleanup.enter_context(
            stack.process(
                "server",
                WEBHOOK_LISTEN_ADDRESS=f"127.0.0.1:{ports[0]}",
                WEBHOOK_ADMIN_ADDRESS="off",
            )
        )
        for port in ports:
            await wait_until_listening(port)
        yield Pipeline(stack, connection, ledger, *ports, {"server": server, "receiver": receiver})


@asynccontextmanager
async def with_engine(
    pipeline: Pipeline, command: str = "delivery", *, kill: bool = False
) -> AsyncIterator[Pipeline]:
    """Add an engine. `command` may be a module that wraps it. `kill` ends it without a drain."""
    with ExitStack() as cleanup:
        engine = cleanup.enter_context(pipeline.stack.process(command))
        await engines_listening(pipeline.connection, 1, engine)
        yield Pipeline(
            pipeline.stack,
            pipeline.connection,
            pipeline.ledger,
            pipeline.server_port,
            pipeline.receiver_port,
            {**pipeline.processes, "engine": engine},
        )
        if kill:
            engine.kill()


async def engines_listening(
    connection: asyncpg.Connection, count: int, process: "subprocess.Popen[bytes]"
) -> None:
    """Return when this many engines run."""
    while await connection.fetchval(_ENGINES_LISTEN) < count:
        if (code := process.poll()) is not None:
            raise RuntimeError(f"the engine ended with {code}; what it said is above")
        await asyncio.sleep(_LOOK_SECONDS)
