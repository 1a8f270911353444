"""Group commit: concurrent calls share a commit, but not their results or errors."""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from uuid import UUID

import pytest

from core.ids import new_id
from core.queue import NewEvent
from server.events.group_commit import GroupCommit, pause_after

type Commits = GroupCommit[tuple[UUID, int]]


def event(payload: bytes = b"{}") -> NewEvent:
    return NewEvent(new_id(), "m_1", "payment.succeeded", "application/json", payload, None, b"")


class Database:
    """Records each batch. Commits wait while `open` is not set."""

    def __init__(self) -> None:
        self.batches: list[list[NewEvent]] = []
        self.started = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def commit(self, events: Sequence[NewEvent]) -> list[tuple[UUID, int]]:
        self.batches.append(list(events))
        self.started.set()
        if any(event.payload == b"poison" for event in events):
            raise ValueError("poison")
        if any(event.payload == b"away" for event in events):
            raise ConnectionResetError
        await self.open.wait()
        return [(event.id, len(events)) for event in events]


@pytest.fixture
def database() -> Database:
    return Database()


async def burst(commits: Commits, calls: int, size: int = 1) -> None:
    """Submit events in concurrent calls and wait for all of them."""
    await asyncio.gather(*(commits.submit([event() for _ in range(size)]) for _ in range(calls)))


async def test_single_call_is_committed_alone(database: Database) -> None:
    single = event()

    stored = await GroupCommit(database).submit([single])

    assert stored == [(single.id, 1)]


async def test_each_call_gets_its_own_results_in_order(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    batches = [[event() for _ in range(size)] for size in (1, 1, 3, 1, 2)]
    calls = [asyncio.create_task(commits.submit(batch)) for batch in batches]
    await database.started.wait()
    await asyncio.create_task(asyncio.sleep(0))
    database.open.set()

    for batch, stored in zip(batches, await asyncio.gather(*calls), strict=True):
        assert [event_id for event_id, _ in stored] == [event.id for event in batch]
    assert max(map(len, database.batches)) > 3


async def test_calls_during_a_commit_share_the_next(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    calls = [asyncio.create_task(commits.submit([event()])) for _ in range(2)]
    await database.started.wait()
    calls += [asyncio.create_task(commits.submit([event()])) for _ in range(50)]
    # Tasks created before this one run up to their first wait.
    await asyncio.create_task(asyncio.sleep(0))
    database.open.set()
    await asyncio.gather(*calls)

    assert len(database.batches) <= 4
    assert sum(map(len, database.batches)) == 52


async def test_commit_holds_whole_calls_and_at_most_1000_events(database: Database) -> None:
    await burst(GroupCommit(database), 7, size=400)

    assert all(len(batch) <= 1000 for batch in database.batches)
    assert sum(map(len, database.batches)) == 2800


async def test_failing_call_does_not_fail_the_others(database: Database) -> None:
    commits = GroupCommit(database)

    results = await asyncio.gather(
        commits.submit([event()]),
        commits.submit([event(b"poison")]),
        commits.submit([event()]),
        return_exceptions=True,
    )

    assert [isinstance(result, ValueError) for result in results] == [False, True, False]


async def test_lost_connection_fails_all_calls_without_retry(database: Database) -> None:
    commits = GroupCommit(database)

    results = await asyncio.gather(
        commits.submit([event(b"away")]), commits.submit([event(b"away")]), return_exceptions=True
    )

    assert all(isinstance(result, ConnectionResetError) for result in results)
    assert len(database.batches) <= 2


async def test_events_of_a_cancelled_call_are_committed(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    cancelled, other = event(), event()
    call = asyncio.create_task(commits.submit([cancelled]))
    beside = asyncio.create_task(commits.submit([other]))
    await database.started.wait()
    call.cancel()
    database.open.set()
    await beside

    assert {e.id for batch in database.batches for e in batch} == {cancelled.id, other.id}
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_repeated_bursts_share_their_commits(database: Database) -> None:
    commits = GroupCommit(database)

    async def publish() -> None:
        for _ in range(20):
            await commits.submit([event()])

    await asyncio.gather(*(publish() for _ in range(20)))

    # Without a pause between commits, about every second commit would hold only a few calls.
    assert len(database.batches) <= 30
    assert sum(map(len, database.batches)) == 400


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait for further calls. Such a wait ends immediately."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", sleep)
    return waited


@pytest.mark.parametrize("callers", [1, 3])
async def test_few_callers_do_not_wait_for_others(
    database: Database, waits: list[float], callers: int
) -> None:
    commits = GroupCommit(database)
    for _ in range(10):
        await burst(commits, callers)
    assert len(database.batches) == 10
    assert waits == []


async def test_first_call_after_a_burst_waits_for_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_ends = asyncio.Event()

    async def sleep(_: float) -> None:
        await wait_ends.wait()

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", sleep)
    commits = GroupCommit(database)
    await burst(commits, 10)
    calls = [asyncio.create_task(commits.submit([event()])) for _ in range(10)]
    # These tasks end only after the ten calls have run up to their first wait.
    await asyncio.gather(*(asyncio.create_task(database.started.wait()) for _ in range(2)))
    assert [len(batch) for batch in database.batches] == [10]

    wait_ends.set()
    await asyncio.gather(*calls)
    assert [len(batch) for batch in database.batches] == [10, 10]


async def test_single_caller_stops_waiting_soon_after_a_burst(
    database: Database, waits: list[float]
) -> None:
    commits = GroupCommit(database, busy_time=lambda: 0.0)
    await burst(commits, 8)
    for _ in range(10):
        await commits.submit([event()])
    # The expected number of calls is halved each time: 8, 4, then too few to wait for.
    assert len(waits) == 2
    assert all(0 < seconds <= 0.002 for seconds in waits)


async def test_wait_continues_while_the_process_is_busy(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[asyncio.Task[Sequence[tuple[UUID, int]]]] = []
    sleep = asyncio.sleep

    async def add_call(_: float) -> None:
        others.append(asyncio.create_task(commits.submit([event()])))
        await sleep(0)

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", add_call)
    commits = GroupCommit(database, busy_time=lambda: perf_counter() if len(others) < 3 else 0.0)
    await burst(commits, 8)

    await commits.submit([event()])

    await asyncio.gather(*others)
    assert [len(batch) for batch in database.batches] == [8, 4]


async def test_wait_for_other_calls_is_bounded(database: Database) -> None:
    commits = GroupCommit(database, busy_time=perf_counter)
    await burst(commits, 8)

    await commits.submit([event()])

    assert [len(batch) for batch in database.batches] == [8, 1]


async def test_large_call_does_not_wait(database: Database, waits: list[float]) -> None:
    commits = GroupCommit(database)
    await burst(commits, 8)
    await burst(commits, 1, size=100)
    assert waits == []


@pytest.fixture
def preferred(database: Database, monkeypatch: pytest.MonkeyPatch) -> Commits:
    """Commits that count as in use for a minute."""
    monkeypatch.setattr("server.events.group_commit._ACTIVE_SECONDS", 60)
    return GroupCommit(database)


async def test_yielding_commits_are_small_while_others_are_in_use(
    database: Database, waits: list[float], preferred: Commits
) -> None:
    yielding = GroupCommit(database, gives_way_to=[preferred])

    await burst(yielding, 9, size=100)
    assert max(map(len, database.batches)) > 200
    assert waits == []

    database.batches.clear()
    await burst(preferred, 1)
    await burst(yielding, 9, size=100)
    assert all(len(batch) <= 100 for batch in database.batches)
    # One pause after each commit of `yielding`.
    assert len(waits) == len(database.batches) - 1
    assert sum(waits) > 0


async def test_yielding_commits_run_one_at_a_time(database: Database, preferred: Commits) -> None:
    yielding = GroupCommit(database, gives_way_to=[preferred])
    await burst(preferred, 1)
    database.batches.clear()
    database.open.clear()
    calls = asyncio.create_task(burst(yielding, 3, size=150))
    for _ in range(3):
        await asyncio.create_task(database.started.wait())
    assert len(database.batches) == 1
    database.open.set()
    await calls
    assert len(database.batches) == 3


@pytest.mark.parametrize(
    ("took", "share", "waited", "pause"),
    [(0.01, 0.5, 0, 0.01), (0.01, 0.1, 0, 0.09), (0.1, 0.05, 0.4, 0.6), (0.1, 0.05, 2, 0.1)],
)
def test_pause_depends_on_the_share_and_is_bounded(
    took: float, share: float, waited: float, pause: float
) -> None:
    assert pause_after(took, share, waited) == pytest.approx(pause)
