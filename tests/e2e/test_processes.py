"""Killed, frozen and stopped processes lose no acknowledged event."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from aiohttp import web

from cli.dev.postgres import EmbeddedPostgres
from core.lifecycle import DeliveryState
from delivery.fairness.concurrency import INITIAL_LIMIT
from postrider.v1 import event_pb2, event_service_pb2
from tests.support.ledger import Counts, balance
from tests.support.platform import Platform
from tests.support.processes import AMPLE, Processes, environment_of, talking_to
from tests.support.receiver import Receiver

LEASE_SECONDS = 2
#: So that leases end within a test's patience.
BRISK: dict[str, Any] = {"delivery_timeout_seconds": 1, "lease_seconds": LEASE_SECONDS}


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path
) -> AsyncIterator[Processes]:
    """Beside the server of `platform`, on the same database."""
    processes = Processes(environment_of(database_url, ca_file, platform.key.public_key_file))
    yield processes
    await processes.kill_all()


class Holding:
    """An answer of 200 that every `one_in`-th request waits for until `release()`."""

    def __init__(self, one_in: int = 1, after: int = 0) -> None:
        self.inside = 0
        self._one_in = one_in
        self._after = after
        self._seen = 0
        self._released = asyncio.Event()
        self._changed = asyncio.Condition()

    def release(self) -> None:
        self._released.set()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self._seen += 1
        if self._seen > self._after and self._seen % self._one_in == 0:
            self.inside += 1
            async with self._changed:
                self._changed.notify_all()
            await self._released.wait()
            self.inside -= 1
        return web.Response()

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._changed:
            await self._changed.wait_for(lambda: self.inside >= count)


async def register(platform: Platform, receiver: Receiver, *merchants: str) -> dict[str, str]:
    """A webhook config for each merchant; the secrets by path, as the ledger takes them."""
    secrets = {}
    for merchant_id in merchants:
        created = await platform.register(f"{receiver.url}/{merchant_id}", merchant_id)
        secrets[f"/hook/{merchant_id}"] = created.secret
    return secrets


async def publish(platform: Platform, merchants: Sequence[str], count: int) -> list[str]:
    """Publish events in one call, to the merchants in turn. Returns the acknowledged ids."""
    request = event_service_pb2.PublishEventsRequest(
        events=[_event(merchants[number % len(merchants)]) for number in range(count)]
    )
    response = await platform.events.PublishEvents(request, metadata=platform.producer())
    return [result.event.id for result in response.results]


def _event(merchant_id: str, idempotency_key: str = "") -> event_pb2.EventInput:
    return event_pb2.EventInput(
        merchant_id=merchant_id,
        type="payment.succeeded",
        payload_text='{"amount": 1}',
        idempotency_key=idempotency_key,
    )


async def open_deliveries(pool: Any) -> Counter[str]:
    return Counter(row["state"] for row in await pool.fetch("SELECT state FROM delivery_queue"))


async def attempts(pool: Any) -> Counter[str]:
    """Attempts on record by outcome."""
    return Counter(row["outcome"] for row in await pool.fetch("SELECT outcome FROM attempts"))


async def warm_up(
    platform: Platform, receiver: Receiver, pool: Any, merchants: Sequence[str], count: int
) -> None:
    """Let the running engines see that these receivers answer, which earns them their places.

    Afterwards all deliveries have finished, in the database and at the receiver.
    """
    await receive(receiver, await publish(platform, merchants, count))
    async with asyncio.timeout(AMPLE):
        while await open_deliveries(pool):
            pass
    await pool.execute("TRUNCATE finished_deliveries, attempts")
    receiver.requests.clear()


async def receive(receiver: Receiver, acknowledged: Sequence[str]) -> None:
    """Return when every acknowledged event has arrived at least once."""
    wanted = set(acknowledged)
    async with asyncio.timeout(AMPLE):
        while missing := len(wanted - {request.message_id for request in receiver.webhooks}):
            await receiver.wait_for(len(receiver.webhooks) + missing, timeout=AMPLE)


async def stop(*engines: Any) -> None:
    """SIGTERM, and a clean end."""
    for engine in engines:
        engine.send(signal.SIGTERM)
    assert [await engine.exit_code() for engine in engines] == [0] * len(engines)


async def test_killed_engine_loses_nothing_and_bounds_duplicates(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    merchants = ["m_1", "m_2", "m_3", "m_4"]
    secrets = await register(platform, receiver, *merchants)
    receiver.default = holding = Holding(after=200)
    victim = await processes.engine(**BRISK, max_in_flight_per_webhook=32)
    acknowledged = await publish(platform, merchants, 200)
    await receive(receiver, acknowledged)
    acknowledged += await publish(platform, merchants, 300)
    await holding.wait_for(4 * 32)
    # Frozen first, so that it can be counted what is in flight when it dies.
    victim.send(signal.SIGSTOP)
    unfinished = await open_deliveries(pool)
    in_flight = unfinished[DeliveryState.LEASED]
    await victim.kill()
    killed_at = monotonic()

    holding.release()
    heir = await processes.engine(**BRISK)
    await receive(receiver, acknowledged)
    # The last duplicates come when the last lease has been taken back.
    await heir.wait_for("attempt", unfinished.total())
    back_after = monotonic() - killed_at
    await stop(heir)
    counts = balance(acknowledged, receiver.webhooks, secrets)
    print(f"\nkill -9 with {in_flight} in flight: {counts}, back after {back_after:.1f} s")
    assert counts.lost == counts.unexpected == counts.invalid == 0
    assert in_flight >= 4 * 32
    # On a busy machine the victim's timeouts may have begun before it died.
    retried = (await attempts(pool)).total() - len(acknowledged)
    assert counts.duplicate <= in_flight + retried
    assert back_after <= LEASE_SECONDS + 10
    assert not await open_deliveries(pool)


class Publisher:
    """Clients that repeat each batch, with the same idempotency keys, until it is acknowledged."""

    def __init__(self, platform: Platform, address: str) -> None:
        self.address = address
        self.acknowledged: list[str] = []
        self.repeated = 0
        self._platform = platform
        self._progress = asyncio.Condition()

    async def publish_batches(self, client: int) -> None:
        for batch in range(20):
            keys = [f"key-{client}-{batch}-{number}" for number in range(10)]
            request = event_service_pb2.PublishEventsRequest(
                events=[_event("m_1", key) for key in keys]
            )
            while not await self._is_acknowledged(request, self.address):
                self.repeated += 1

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._progress:
            await self._progress.wait_for(lambda: len(self.acknowledged) >= count)

    async def turn_to(self, address: str) -> None:
        async with self._progress:
            self.address = address
            self._progress.notify_all()

    async def _is_acknowledged(
        self, request: event_service_pb2.PublishEventsRequest, address: str
    ) -> bool:
        """Whether it was; after a call that failed it returns once there is another server."""
        try:
            async with talking_to(address, self._platform) as client:
                response = await client.events.PublishEvents(
                    request, metadata=client.producer(), timeout=AMPLE
                )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            async with asyncio.timeout(AMPLE), self._progress:
                await self._progress.wait_for(lambda: self.address != address)
            return False
        async with self._progress:
            self.acknowledged += [result.event.id for result in response.results]
            self._progress.notify_all()
        return True


async def test_killed_server_and_repeated_calls_publish_once(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    secrets = await register(platform, receiver, "m_1")
    engine = await processes.engine()
    server, address = await processes.server()
    publisher = Publisher(platform, address)
    async with asyncio.TaskGroup() as clients:
        for client in range(4):
            clients.create_task(publisher.publish_batches(client))
        for enough in (200, 500):
            await publisher.wait_for(enough)
            await server.kill()
            server, address = await processes.server()
            await publisher.turn_to(address)

    await receive(receiver, publisher.acknowledged)
    await stop(engine, server)
    assert publisher.repeated >= 2, "no call was under way when the server died"
    counts = balance(publisher.acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(800, 800, lost=0, duplicate=0, unexpected=0, invalid=0)
    assert await pool.fetchval("SELECT count(*) FROM events") == 800


async def test_sigterm_under_load_duplicates_and_fails_nothing(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    merchants = [f"m_{number}" for number in range(8)]
    secrets = await register(platform, receiver, *merchants)
    receiver.default = holding = Holding(one_in=10)
    # Few places, so that neither can have everything there is to do in flight.
    leaving, staying = await asyncio.gather(
        processes.engine(max_in_flight=40), processes.engine(max_in_flight=40)
    )
    acknowledged = await publish(platform, merchants, 300)
    await leaving.wait_for("attempt", 20)
    await holding.wait_for(10)
    leaving.send(signal.SIGTERM)
    await leaving.wait_for("stopping")
    acknowledged += await publish(platform, merchants, 300)
    holding.release()
    assert await leaving.exit_code() == 0
    await receive(receiver, acknowledged)
    await stop(staying)

    assert staying.named("attempt")
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(600, 600, lost=0, duplicate=0, unexpected=0, invalid=0)
    assert await attempts(pool) == {"succeeded": 600}
    assert not await open_deliveries(pool)


async def test_two_servers_and_two_engines_share_work(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    merchants = [f"m_{number}" for number in range(8)]
    secrets = await register(platform, receiver, *merchants)
    holding = Holding()
    engines = await asyncio.gather(
        processes.engine(max_in_flight=20), processes.engine(max_in_flight=20)
    )
    await warm_up(platform, receiver, pool, merchants, 400)
    receiver.default = holding
    servers = await asyncio.gather(processes.server(), processes.server())
    acknowledged = []
    for _, address in servers:
        async with talking_to(address, platform) as client:
            acknowledged += await publish(client, merchants, 200)
    # More than one engine may have in flight, so both are at work.
    await holding.wait_for(21)
    holding.release()
    await receive(receiver, acknowledged)
    await stop(*engines, *(server for server, _ in servers))

    assert all(engine.named("attempt") for engine in engines)
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(400, 400, lost=0, duplicate=0, unexpected=0, invalid=0)
    assert await attempts(pool) == {"succeeded": 400}


@pytest.mark.parametrize("max_retries", [0, 3])
async def test_engine_thawed_after_its_leases_changes_nothing(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any, max_retries: int
) -> None:
    secrets = await register(platform, receiver, "m_1")
    receiver.default = holding = Holding()
    sleeper = await processes.engine(**BRISK, max_retries=max_retries)
    acknowledged = await publish(platform, ["m_1"], INITIAL_LIMIT)
    await holding.wait_for(INITIAL_LIMIT)
    sleeper.send(signal.SIGSTOP)
    other = await processes.engine()
    await holding.wait_for(2 * INITIAL_LIMIT)
    sleeper.send(signal.SIGCONT)
    # It finds its requests timed out, and must neither put that on record nor end the new leases.
    await sleeper.wait_for("lease_lost", INITIAL_LIMIT)
    assert await open_deliveries(pool) == {DeliveryState.LEASED: INITIAL_LIMIT}
    holding.release()
    await other.wait_for("attempt", INITIAL_LIMIT)
    await stop(sleeper, other)

    assert not await open_deliveries(pool)
    assert await attempts(pool) == {"succeeded": INITIAL_LIMIT}
    assert await pool.fetchval("SELECT consecutive_failures FROM webhook_configs") == 0
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(
        INITIAL_LIMIT, 2 * INITIAL_LIMIT, lost=0, duplicate=INITIAL_LIMIT, unexpected=0, invalid=0
    )


@pytest.mark.parametrize(
    ("command", "settings", "told"),
    [
        ("server", {"database_url": "postgresql://127.0.0.1:1/none"}, "WEBHOOK_DATABASE_URL"),
        ("delivery", {"database_url": "postgresql://127.0.0.1:1/none"}, "WEBHOOK_DATABASE_URL"),
        ("migrate", {"database_url": "postgresql://127.0.0.1:1/none"}, "WEBHOOK_DATABASE_URL"),
        ("delivery", {"database_url": None}, "WEBHOOK_DATABASE_URL is not set"),
        ("server", {"encryption_keys": None}, "WEBHOOK_ENCRYPTION_KEYS"),
        ("delivery", {"encryption_keys": "k1:c2hvcnQ="}, "WEBHOOK_ENCRYPTION_KEYS"),
        ("server", {"databse_pool_size": "5"}, "did you mean WEBHOOK_DATABASE_POOL_SIZE?"),
        ("server", {"ca_file": "/nowhere/ca.pem"}, "WEBHOOK_CA_FILE"),
        ("delivery", {"ca_file": "/nowhere/ca.pem"}, "WEBHOOK_CA_FILE"),
        ("delivery", {"database_pool_size": "many"}, "WEBHOOK_DATABASE_POOL_SIZE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_failed_start_prints_one_line(
    processes: Processes, command: str, settings: dict[str, Any], told: str
) -> None:
    await assert_refuses_to_start(processes, command, settings, told)


@pytest.mark.parametrize("command", ["server", "delivery"])
async def test_start_on_unmigrated_database_names_migrate(
    processes: Processes, postgres: EmbeddedPostgres, command: str
) -> None:
    settings: dict[str, Any] = {"database_url": postgres.url("postgres")}
    await assert_refuses_to_start(processes, command, settings, "postrider migrate")


async def assert_refuses_to_start(
    processes: Processes, command: str, settings: dict[str, Any], told: str
) -> None:
    # Without the allow-list, of which there would be a warning.
    process = await processes.start(command, allowed_cidrs=None, **settings)
    assert await process.exit_code() in {1, 2}
    [line] = process.lines
    assert line.startswith("postrider: ")
    assert told in line
