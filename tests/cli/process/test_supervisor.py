"""`postrider delivery --processes`: several engines that start, stop and die as one service."""

import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_processes import (
    Holding,
    attempts,
    open_deliveries,
    publish,
    receive,
    register,
    stop,
    warm_up,
)
from tests.support.ledger import Counts, balance
from tests.support.platform import Platform
from tests.support.processes import Process, Processes, environment_of
from tests.support.receiver import Receiver

MERCHANTS = [f"m_{number}" for number in range(8)]
#: Few places, so that no engine can have all there is to do in flight.
PLACES = 20
#: Leases that end, and drains that give up, within a test's patience.
BRISK = {
    "max_in_flight": PLACES,
    "delivery_timeout_seconds": 5,
    "lease_seconds": 10,
    "delivery_drain_seconds": 10,
}
#: For tests that hold responses back: no attempt may time out meanwhile, however busy the machine.
PATIENT = {"delivery_timeout_seconds": 30, "lease_seconds": 60, "delivery_drain_seconds": 30}


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path
) -> AsyncIterator[Processes]:
    processes = Processes(environment_of(database_url, ca_file, platform.key.public_key_file))
    yield processes
    await processes.kill_all()


async def supervisor(processes: Processes, **settings: Any) -> Process:
    """A supervisor whose two engines deliver."""
    process = await processes.start("delivery", "--processes=2", **(BRISK | settings))
    await process.wait_for("delivering", 2)
    return process


def engine_pids(supervisor: Process) -> Sequence[int]:
    return [entry["pid"] for entry in supervisor.named("engine_started")]


async def test_sigterm_drains_every_engine_and_nothing_is_sent_twice(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    secrets = await register(platform, receiver, *MERCHANTS)
    holding = Holding()
    both = await supervisor(processes, **PATIENT)
    await warm_up(platform, receiver, pool, MERCHANTS, 400)
    receiver.default = holding
    acknowledged = await publish(platform, MERCHANTS, 200)
    await holding.wait_for(PLACES)
    both.send(signal.SIGTERM)
    await both.wait_for("draining", 2)
    # As systemd does, which signals every process of a unit: it is the first they get.
    for engine in engine_pids(both):
        os.kill(engine, signal.SIGTERM)
    holding.release()
    assert await both.exit_code() == 0
    # Drained, and no more: what was not in flight waits for others.
    drained = (await attempts(pool))["succeeded"]
    assert PLACES <= drained <= 2 * PLACES
    left = await open_deliveries(pool)
    assert (left["leased"], left.total()) == (0, 200 - drained)

    heirs = await supervisor(processes)
    await receive(receiver, acknowledged)
    await stop(heirs)
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(200, 200, lost=0, duplicate=0, unexpected=0, invalid=0)
    assert await attempts(pool) == {"succeeded": 200}


async def test_killed_engine_is_replaced_and_nothing_is_lost(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    secrets = await register(platform, receiver, *MERCHANTS)
    holding = Holding()
    both = await supervisor(processes)
    await warm_up(platform, receiver, pool, MERCHANTS, 400)
    receiver.default = holding
    acknowledged = await publish(platform, MERCHANTS, 200)
    await holding.wait_for(2 * PLACES)
    victim = engine_pids(both)[1]
    os.kill(victim, signal.SIGKILL)
    [ended] = await both.wait_for("engine_ended")
    assert (ended["engine"], ended["exit_code"]) == (2, -signal.SIGKILL)
    await both.wait_for("delivering", 3)
    # The surviving engine keeps its slots, so further requests are from the new one, which gives
    # half of its slots to receivers that it does not know.
    await holding.wait_for(2 * PLACES + PLACES // 2)
    holding.release()
    await receive(receiver, acknowledged)
    await stop(both)
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts.lost == counts.unexpected == counts.invalid == 0
    # Attempts that reached their timeout were repeated.
    timed_out = (await attempts(pool)).get("timeout", 0)
    assert counts.duplicate <= PLACES + timed_out


async def test_an_engine_that_keeps_dying_is_started_ever_more_slowly(
    processes: Processes,
) -> None:
    both = await supervisor(processes)
    for died in range(3):
        os.kill(engine_pids(both)[-1], signal.SIGKILL)
        await both.wait_for("engine_started", 3 + died)
    delays = [entry["restart_seconds"] for entry in both.named("engine_ended")]
    assert delays == [0.5, 1.0, 2.0]
    await stop(both)


async def test_engines_without_their_supervisor_drain_and_end(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    secrets = await register(platform, receiver, *MERCHANTS)
    holding = Holding()
    both = await supervisor(processes, **PATIENT)
    await warm_up(platform, receiver, pool, MERCHANTS, 400)
    receiver.default = holding
    acknowledged = await publish(platform, MERCHANTS, PLACES)
    await holding.wait_for(PLACES)
    both.send(signal.SIGKILL)
    await both.wait_for("supervisor_gone", 2)
    await both.wait_for("draining", 2)
    holding.release()
    # stderr is closed when the last engine has ended.
    assert await both.exit_code() == -signal.SIGKILL
    counts = balance(acknowledged, receiver.webhooks, secrets)
    assert counts == Counts(PLACES, PLACES, lost=0, duplicate=0, unexpected=0, invalid=0)
    assert not await open_deliveries(pool)


async def test_a_second_signal_ends_every_engine_at_once(
    platform: Platform, receiver: Receiver, processes: Processes, pool: Any
) -> None:
    await register(platform, receiver, *MERCHANTS)
    holding = Holding()
    both = await supervisor(processes, **PATIENT)
    await warm_up(platform, receiver, pool, MERCHANTS, 400)
    receiver.default = holding
    await publish(platform, MERCHANTS, PLACES)
    await holding.wait_for(PLACES)
    both.send(signal.SIGTERM)
    await both.wait_for("draining", 2)
    both.send(signal.SIGINT)
    assert await both.exit_code() == 128 + signal.SIGINT
    # Nothing was settled or released: others send it again when the leases end.
    assert await open_deliveries(pool) == {"leased": PLACES}
    holding.release()


@pytest.mark.parametrize(
    ("settings", "told", "exit_code"),
    [
        ({"database_url": "postgresql://127.0.0.1:1/none"}, "WEBHOOK_DATABASE_URL", 1),
        ({"ca_file": "/nowhere/ca.pem"}, "WEBHOOK_CA_FILE", 2),
    ],
)
async def test_a_fault_at_the_start_is_told_once_and_not_repeated(
    processes: Processes, settings: dict[str, Any], told: str, exit_code: int
) -> None:
    both = await processes.start("delivery", delivery_processes=2, log_level="warning", **settings)
    assert await both.exit_code() == exit_code
    said = [line for line in both.lines if line.startswith("postrider: ")]
    assert len(said) == 2
    assert told in said[0]
    assert "the reason is above" in said[1]


async def test_a_wrong_setting_is_refused_before_any_engine_is_started(
    processes: Processes,
) -> None:
    both = await processes.start("delivery", "--processes=2", database_pool_size="many")
    assert await both.exit_code() == 2
    [line] = both.lines
    assert "WEBHOOK_DATABASE_POOL_SIZE" in line
