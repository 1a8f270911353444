"""A whole Postrider of real processes, with load, for the tests that take a part of it away."""

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

#: So that leases end within a test's patience, and no delivery is given up.
BRISK: dict[str, Any] = {
    "delivery_timeout_seconds": 2,
    "lease_seconds": 4,
    "retry_schedule_seconds": "0.2,0.5,1",
    "max_retries": 20,
    "max_consecutive_failures": 1_000_000,
    "max_in_flight": 64,
}
#: For faults that end no lease: so that a busy machine ends none, either.
PATIENT: dict[str, Any] = {"delivery_timeout_seconds": 10, "lease_seconds": 60}
MERCHANTS = tuple(f"m_{number}" for number in range(8))
#: What is promised for 1,000 in flight.
ENGINE_MB_MAX = 150


class Scene:
    """Server, engines and merchants of one test; `load` publishes to them through the fault."""

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
        """A webhook config at the receiver; its id."""
        created = await self.platform.register(
            url or f"{self.receiver.url}/{merchant_id}", merchant_id, **fields
        )
        self.secrets[f"/hook/{merchant_id}"] = created.secret
        return created.webhook_config.id

    async def engine(self, *, under: Sequence[str] = (), **settings: Any) -> Process:
        """One more engine."""
        engine = await self.processes.engine(under=under, **{**BRISK, **settings})
        self.engines.append(engine)
        return engine

    async def leased(self) -> int:
        """How many deliveries are leased: what is in flight, in all engines."""
        count: int = await self.pool.fetchval(
            "SELECT count(*) FROM delivery_queue WHERE state = 'leased'"
        )
        return count

    async def leased_at_least(self, count: int, timeout: float = AMPLE) -> None:
        """So many deliveries are leased; what is looked at again 20 times a second."""
        async with asyncio.timeout(timeout):
            while await self.leased() < count:
                await self.pool.execute("SELECT pg_sleep(0.05)")

    async def failed_attempts(self) -> int:
        """Attempts on record that did not succeed; their receivers may have had the webhook."""
        count: int = await self.pool.fetchval(
            "SELECT count(*) FROM attempts WHERE outcome <> 'succeeded'"
        )
        return count

    def reclaimed(self) -> int:
        """Leases that ended without a result, as the engines tell."""
        entries = [e for engine in self.engines for e in engine.named("leases_reclaimed")]
        return sum(entry["deliveries"] for entry in entries)

    async def is_alive(self) -> None:
        """A fresh event arrives."""
        published = await self.platform.publish(merchant_id=MERCHANTS[0])
        self.load.acknowledged.append(published.event.id)
        await self.load.all_arrived()

    async def drained(self, where: str = "true", timeout: float = AMPLE) -> None:
        """Nothing is open any more; what is looked at again 20 times a second."""
        query = f"SELECT EXISTS (SELECT FROM delivery_queue WHERE {where}) FROM pg_sleep(0.05)"  # noqa: S608
        async with asyncio.timeout(timeout):
            while await self.pool.fetchval(query):
                pass

    async def verified(self) -> None:
        """`postrider verify` finds nothing broken."""
        process = await asyncio.create_subprocess_exec(
            POSTRIDER,
            "verify",
            "--json",
            env={"PATH": os.environ["PATH"], **self.processes.environment},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(AMPLE):
            printed, _ = await process.communicate()
        told = orjson.loads(printed)
        assert [i for i in told["invariants"] if i["broken"]] == []
        assert (process.returncode, told["complete"]) == (0, True)

    def counts(self) -> Counts:
        return balance(self.load.acknowledged, self.receiver.webhooks, self.secrets)

    def megabytes(self) -> float:
        """The most memory any engine that lives has had."""
        return max(engine.peak_megabytes() for engine in self.engines if engine.lives)


#: `conclude(scene, fault, most_duplicates)`, a fixture.
type Conclude = Callable[..., Any]
