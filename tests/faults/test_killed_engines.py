"""Engines are killed, frozen and restarted under load: nothing is lost, duplicates are bounded."""

import asyncio
import random
import signal

import pytest

from tests.support.system_under_load import PATIENT, Conclude, SystemUnderLoad


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_one_of_two_engines_killed_at_random(
    system: SystemUnderLoad, conclude: Conclude, seed: int
) -> None:
    moments = random.Random(seed)  # noqa: S311 - the same ones every time
    engines = [await system.engine(), await system.engine()]
    in_flight = 0
    async with system.load.running() as load:
        for _ in range(3):
            await load.arrived_more(moments.randint(50, 400))
            victim = moments.choice(engines)
            await victim.kill()
            in_flight += await system.leased()
            engines.remove(victim)
            await load.arrived_more(moments.randint(1, 100))
            engines.append(await system.engine())
    await conclude(system, f"kill -9 of one of two engines, 3 times, seed {seed}", in_flight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_all_engines_killed_at_random(
    system: SystemUnderLoad, conclude: Conclude, seed: int
) -> None:
    moments = random.Random(seed)  # noqa: S311 - the same ones every time
    in_flight = 0
    async with system.load.running() as load:
        for _ in range(4):
            engines = await asyncio.gather(system.engine(), system.engine())
            await load.arrived_more(moments.randint(1, 300))
            await asyncio.gather(*(engine.kill() for engine in engines))
            in_flight += await system.leased()
        await system.engine()
    await conclude(system, f"kill -9 of all engines, 4 times, seed {seed}", in_flight)


@pytest.mark.slow
async def test_engine_frozen_past_its_leases(system: SystemUnderLoad, conclude: Conclude) -> None:
    sleeper = await system.engine()
    async with system.load.running() as load:
        await load.arrived_more(200)
        # Or it could freeze at a moment when it holds nothing.
        quick, load.seconds = load.seconds, (1, 1)
        await system.leased_at_least(20)
        sleeper.send(signal.SIGSTOP)
        in_flight = await system.leased()
        load.seconds = quick
        other = await system.engine()
        # All of its leases have been taken back, and a second engine's worth of work is done.
        await other.wait_for("leases_reclaimed")
        await load.arrived_more(200)
        sleeper.send(signal.SIGCONT)
        await sleeper.wait_for("lease_lost")
        await load.arrived_more(200)
    await conclude(system, "an engine frozen past its leases", in_flight)


@pytest.mark.slow
async def test_rolling_restart_duplicates_and_fails_nothing(
    system: SystemUnderLoad, conclude: Conclude
) -> None:
    engines = [await system.engine(**PATIENT), await system.engine(**PATIENT)]
    async with system.load.running() as load:
        for _ in range(4):
            await load.arrived_more(100)
            leaving = engines.pop(0)
            leaving.send(signal.SIGTERM)
            await leaving.wait_for("stopping")
            engines.append(await system.engine(**PATIENT))
            assert await leaving.exit_code() == 0
    counts = await conclude(system, "a rolling restart of two engines, twice", 0)
    assert counts.duplicate == 0
    assert await system.failed_attempts() == 0
