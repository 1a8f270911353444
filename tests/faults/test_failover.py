"""The primary dies and its synchronous standby takes over, all under load and without a restart."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from cli.ops.migrate import migrate
from tests.conftest import database_settings
from tests.support.doc_pages import section, sh
from tests.support.load import Load
from tests.support.processes import AMPLE
from tests.support.standby import Node, Pair, operators_path
from tests.support.system_under_load import BRISK, Conclude, SystemUnderLoad

pytestmark = pytest.mark.slow

type StartSystem = Callable[..., AbstractAsyncContextManager[SystemUnderLoad]]

#: From the promotion to a fresh event that was accepted and has arrived.
BACK_SECONDS = 5.0
#: The same where connections have to be given up first: a statement has 10 s by default and one of
#: grace, and then asking for its end has as long.
HANGING_SECONDS = 30.0

#: But those that only ask who it is, and leave.
_OUR_SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE application_name LIKE 'postrider%' AND backend_start < now() - interval '1 second'
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="postrider-tests-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
async def pair(directory: Path) -> AsyncIterator[Pair]:
    pair = Pair(directory)
    try:
        await pair.start()
        await asyncio.to_thread(migrate, database_settings(pair.url))
        yield pair
    finally:
        pair.stop()


@pytest.fixture
def database_url(pair: Pair) -> str:
    return pair.url


async def test_killed_primary_fails_over(
    system: SystemUnderLoad, pair: Pair, conclude: Conclude
) -> None:
    async with under_load(system, 300) as load:
        in_flight = await lose_primary(system, pair)
        seconds = await load.fresh_arrives()
        await load.arrived_more(300)
    await conclude(system, f"failover, back in {seconds:.1f} s", in_flight)
    assert seconds <= BACK_SECONDS
    assert all(process.lives for process in system.processes.started)


async def test_commit_without_standby_is_not_acknowledged(
    start_system: StartSystem, pair: Pair, conclude: Conclude
) -> None:
    """The first publish is stored on the primary only, where its repetition finds it."""
    async with start_system(database_statement_timeout_seconds=0.5) as system:
        async with under_load(system, 100) as load:
            in_flight = await system.leased()
            with pair.standby.frozen():
                # Every client repeats it more than once.
                await nothing_is_acknowledged(load, 3 * 3, timeout=60)
                # The standby has no settlement of deliveries that were sent meanwhile.
                in_flight += await system.leased()
                pair.primary.kill()
            await pair.fail_over()
            seconds = await load.fresh_arrives()
        await conclude(system, f"failover from a primary alone, back in {seconds:.1f} s", in_flight)


async def test_planned_switchover_and_back(
    system: SystemUnderLoad, pair: Pair, conclude: Conclude
) -> None:
    in_flight, longest = 0, 0.0
    async with under_load(system, 200) as load:
        for _ in range(2):
            in_flight += await system.leased()
            # It waits until the standby has everything.
            pair.primary.stop()
            await pair.fail_over()
            longest = max(longest, await load.fresh_arrives())
            await pair.follow()
            await load.arrived_more(200)
    await conclude(system, f"switchover and back, each in {longest:.1f} s", in_flight)
    assert longest <= BACK_SECONDS
    assert all(process.lives for process in system.processes.started)


async def test_returned_old_primary_gets_no_writes(
    system: SystemUnderLoad, pair: Pair, conclude: Conclude
) -> None:
    async with under_load(system, 200) as load:
        in_flight = await lose_primary(system, pair)
        await load.arrived_more(100)
        # Nobody kept it from starting, and it takes itself for the primary.
        pair.standby.start()
        assert await pair.standby.fetchval("SELECT NOT pg_is_in_recovery()")
        events = await pair.standby.fetchval("SELECT count(*) FROM events")
        await load.arrived_more(400)
        assert await pair.standby.fetchval("SELECT count(*) FROM events") == events
        await keeps_no_session(pair.standby, load)
        # Now it is a standby, and new connections skip it, although it is listed first.
        pair.standby.stop()
        await pair.follow()
        await system.engine()
        await load.arrived_more(200)
        await keeps_no_session(pair.standby, load)
    await conclude(system, "old primary back after a failover", in_flight)


async def keeps_no_session(server: Node, load: Load) -> None:
    """A refused connection may live for a moment on a busy machine, a pooled one for minutes."""
    async with asyncio.timeout(AMPLE):
        while await server.fetchval(_OUR_SESSIONS):
            await load.arrived_more(20)


async def test_lost_standby_blocks_publishing_until_operator_acts(
    system: SystemUnderLoad, pair: Pair, conclude: Conclude
) -> None:
    async with under_load(system, 100) as load:
        in_flight = await system.leased()
        pair.standby.kill()
        await nothing_is_acknowledged(load, 3)
        # The lines of docs/operate/runbook.md.
        go_on_alone, verify = section("docs/operate/runbook.md", "Database failing over")
        environment = {"PATH": operators_path(), "WEBHOOK_DATABASE_URL": pair.url}
        await asyncio.to_thread(sh, go_on_alone, environment)
        seconds = await load.fresh_arrives()
        await load.arrived_more(100)
        await pair.follow()
    assert "everything was checked" in await asyncio.to_thread(sh, verify, environment)
    await conclude(system, f"standby away, back in {seconds:.1f} s", in_flight)
    assert seconds <= BACK_SECONDS


async def test_frozen_primary_is_left_for_promoted_standby(
    system: SystemUnderLoad, pair: Pair, conclude: Conclude
) -> None:
    """Its connections stay, and say nothing: as with a disk that does not answer."""
    async with under_load(system, 200) as load:
        in_flight = await system.leased()
        with pair.primary.frozen():
            await pair.fail_over()
            seconds = await load.fresh_arrives()
            await load.arrived_more(300)
            pair.standby.kill()
    await conclude(
        system, f"failover from a primary that hangs, back in {seconds:.1f} s", in_flight
    )
    assert seconds <= HANGING_SECONDS
    assert all(process.lives for process in system.processes.started)


@asynccontextmanager
async def under_load(system: SystemUnderLoad, arrived: int) -> AsyncIterator[Load]:
    """Two engines under their supervisor, and load, from when so many events have arrived."""
    supervisor = await system.processes.start("delivery", "--processes=2", **BRISK)
    await supervisor.wait_for("delivering", 2)
    system.engines.append(supervisor)
    async with system.load.running() as load:
        await load.arrived_more(arrived)
        yield load


async def lose_primary(system: SystemUnderLoad, pair: Pair) -> int:
    """Kill it and promote the standby; how many deliveries were leased just before."""
    leased = await system.leased()
    pair.primary.kill()
    await pair.fail_over()
    return leased


async def nothing_is_acknowledged(load: Load, repeated: int, timeout: float = AMPLE) -> None:
    """Not while so many calls are repeated, from when every client has repeated one."""
    async with load.pressing_on():
        await load.repeated_more(3)
        acknowledged = len(load.acknowledged)
        await load.repeated_more(repeated, timeout)
        assert len(load.acknowledged) == acknowledged
