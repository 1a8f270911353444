"""Postrider with real processes under load, for tests that stop a part of it."""

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from tests.support.ledger import Counts, balance
from tests.support.load import Load
from tests.support.platform import Platform
from tests.support.processes import AMPLE, POSTRIDER, Process, Processes
from tests.support.receiver import Receiver

#: Leases expire within the time of a test, and no delivery uses up its attempts.
BRISK: dict[str, Any] = {
    "delivery_timeout_seconds": 2,
    "lease_seconds": 4,
    "retry_schedule_seconds": "0.2,0.5,1",
    "max_retries": 20,
    "max_consecutive_failures": 1_000_000,
    "max_in_flight": 64,
}
#: For faults without expired leases. A busy machine must not let one expire either.
PATIENT: dict[str, Any] = {"delivery_timeout_seconds": 10, "lease_seconds": 60}
MERCHANTS = tuple(f"m_{number}" for number in range(8))
#: The documented limit with 1,000 deliveries in flight.
ENGINE_MB_MAX = 150


class SystemUnderLoad:
    """Server, engines and merchants of one test. `load` publishes events during the fault."""

    def __init__(
        self, processes: Processes, platform: Platform, receiver: Receiver, pool: Any
    ) -> None:
        self.processes = processes
        self.platform = platform
        self.receiver = receiver
        self.pool = pool
        self.load = Load(platform, MERCHANTS)
        self.engines: list[Process] = []
        self.secrets: dict[str, str] = {}

    async def register(self, merchant_id: str, url: str | None = None, **fields: Any) -> str:
        """Create a webhook config for the receiver. Returns its id."""
        created = await self.platform.register(
            url or f"{self.receiver.url}/{merchant_id}", merchant_id, **fields
        )
        self.secrets[f"/hook/{merchant_id}"] = created.secret
        return created.webhook_config.id

    async def engine(self, *, under: Sequence[str] = (), **settings: Any) -> Process:
        """Start another engine."""
        engine = await self.processes.engine(under=under, **{**BRISK, **settings})
        self.engines.append(engine)
        return engine

    async def leased(self) -> int:
        """The number of leased deliveries, which are in flight in any engine."""
        count: int = await self.pool.fetchval(
            "SELECT count(*) FROM delivery_queue WHERE state = 'leased'"
        )
        return count

    async def leased_at_least(self, count: int, timeout: float = AMPLE) -> None:
        """Wait until this many deliveries are leased. Polls every 50 ms."""
        async with asyncio.timeout(timeout):
            while await self.leased() < count:
                await self.pool.execute("SELECT pg_sleep(0.05)")

    async def failed_attempts(self) -> int:
        """The number of recorded attempts that failed. Their receivers may have got the webhook."""
        count: int = await self.pool.fetchval(
            "SELECT count(*) FROM attempts WHERE outcome <> 'succeeded'"
        )
        return count

    def reclaimed(self) -> int:
        """The number of leases that expired, from the logs of the engines."""
        entries = [e for engine in self.engines for e in engine.named("leases_reclaimed")]
        return sum(entry["deliveries"] for entry in entries)

    async def is_alive(self) -> None:
        """Publish an event and wait until it arrives."""
        published = await self.platform.publish(merchant_id=MERCHANTS[0])
        self.load.acknowledged.append(published.event.id)
        await self.load.all_arrived()

    async def drained(self, where: str = "true", timeout: float = AMPLE) -> None:
        """Wait until no delivery is pending. Polls every 50 ms."""
        query = f"SELECT EXISTS (SELECT FROM delivery_queue WHERE {where}) FROM pg_sleep(0.05)"  # noqa: S608
        async with asyncio.timeout(timeout):
            while await self.pool.fetchval(query):
                pass

    async def verified(self) -> None:
        """Fails if `postrider verify` finds a violation."""
        process = await asyncio.create_subprocess_exec(
            POSTRIDER,
            "verify",
            "--json",
            env={"PATH": os.environ["PATH"], **self.processes.environment},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(AMPLE):
            printed, _ = await process.communicate()
        report = orjson.loads(printed)
        assert [i for i in report["invariants"] if i["broken"]] == []
        assert (process.returncode, report["complete"]) == (0, True)

    def counts(self) -> Counts:
        return balance(self.load.acknowledged, self.receiver.webhooks, self.secrets)

    def megabytes(self) -> float:
        """The peak memory of the running engines."""
        return max(engine.peak_megabytes() for engine in self.engines if engine.lives)


#: `conclude(system, fault, most_duplicates)`, a fixture.
type Conclude = Callable[..., Any]
