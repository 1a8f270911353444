"""Group commit: calls that come together share a commit, and nothing else."""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from uuid import UUID

import pytest

from core.ids import new_id
from core.queue import NewEvent
from server.events.group_commit import GroupCommit, pause_after


def event(payload: bytes = b"{}") -> NewEvent:
    return NewEvent(new_id(), "m_1", "payment.succeeded", "application/json", payload, None, b"")


class Database:
    """Stands for the commit: keeps each batch waiting until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[NewEvent]] = []
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def commit(self, events: Sequence[NewEvent]) -> list[tuple[UUID, int]]:
        self.batches.append(list(events))
        self.asked.set()
        if any(event.payload == b"poison" for event in events):
            raise ValueError("poison")
        if any(event.payload == b"away" for event in events):
            raise ConnectionResetError
        await self.open.wait()
        return [(event.id, len(events)) for event in events]


@pytest.fixture
def database() -> Database:
    return Database()


async def test_lone_call_is_committed_at_once_and_alone(database: Database) -> None:
    single = event()

    stored = await GroupCommit(database).submit([single])

    assert stored == [(single.id, 1)]


async def test_each_call_hears_of_its_own_events_in_their_order(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    batches = [[event() for _ in range(size)] for size in (1, 1, 3, 1, 2)]
    calls = [asyncio.create_task(commits.submit(batch)) for batch in batches]
    await database.asked.wait()
    await asyncio.create_task(asyncio.sleep(0))
    database.open.set()

    for batch, stored in zip(batches, await asyncio.gather(*calls), strict=True):
        assert [event_id for event_id, _ in stored] == [event.id for event in batch]
    assert max(map(len, database.batches)) > 3


async def test_calls_that_arrive_during_a_commit_share_the_next(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    calls = [asyncio.create_task(commits.submit([event()])) for _ in range(2)]
    await database.asked.wait()
    calls += [asyncio.create_task(commits.submit([event()])) for _ in range(50)]
    # Every task that was made before this one runs up to its first wait.
    await asyncio.create_task(asyncio.sleep(0))
    database.open.set()
    await asyncio.gather(*calls)

    assert len(database.batches) <= 4
    assert sum(map(len, database.batches)) == 52


async def test_a_call_is_never_split_and_a_commit_is_bounded(database: Database) -> None:
    commits = GroupCommit(database)
    calls = [[event() for _ in range(400)] for _ in range(7)]

    await asyncio.gather(*(commits.submit(call) for call in calls))

    assert all(len(batch) <= 1000 for batch in database.batches)
    assert sum(map(len, database.batches)) == 2800


async def test_one_calls_fault_is_not_the_others(database: Database) -> None:
    commits = GroupCommit(database)

    results = await asyncio.gather(
        commits.submit([event()]),
        commits.submit([event(b"poison")]),
        commits.submit([event()]),
        return_exceptions=True,
    )

    assert [isinstance(result, ValueError) for result in results] == [False, True, False]


async def test_a_lost_database_is_every_callers_error_and_is_not_asked_again(
    database: Database,
) -> None:
    commits = GroupCommit(database)

    results = await asyncio.gather(
        commits.submit([event(b"away")]), commits.submit([event(b"away")]), return_exceptions=True
    )

    assert all(isinstance(result, ConnectionResetError) for result in results)
    assert len(database.batches) <= 2


async def test_a_cancelled_caller_leaves_its_events_in_the_commit(database: Database) -> None:
    commits = GroupCommit(database)
    database.open.clear()
    given_up, other = event(), event()
    call = asyncio.create_task(commits.submit([given_up]))
    beside = asyncio.create_task(commits.submit([other]))
    await database.asked.wait()
    call.cancel()
    database.open.set()
    await beside

    assert {e.id for batch in database.batches for e in batch} == {given_up.id, other.id}
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_callers_that_come_together_again_and_again_share_their_commits(
    database: Database,
) -> None:
    commits = GroupCommit(database)

    async def publish() -> None:
        for _ in range(20):
            await commits.submit([event()])

    await asyncio.gather(*(publish() for _ in range(20)))

    # Without a distance between commits about every second would be for a few callers only.
    assert len(database.batches) <= 30
    assert sum(map(len, database.batches)) == 400


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait for company; it is over at once."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", sleep)
    return waited


@pytest.mark.parametrize("callers", [1, 3])
async def test_a_caller_that_is_alone_or_nearly_never_waits_for_company(
    database: Database, waits: list[float], callers: int
) -> None:
    commits = GroupCommit(database)
    for _ in range(10):
        await asyncio.gather(*(commits.submit([event()]) for _ in range(callers)))
    assert len(database.batches) == 10
    assert waits == []


async def test_the_first_call_after_a_crowd_waits_for_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_enough = asyncio.Event()

    async def sleep(_: float) -> None:
        await waited_enough.wait()

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", sleep)
    commits = GroupCommit(database)
    await asyncio.gather(*(commits.submit([event()]) for _ in range(10)))
    first = asyncio.create_task(commits.submit([event()]))
    others = [asyncio.create_task(commits.submit([event()])) for _ in range(9)]
    # Cannot be ready before the ten of them have run.
    await asyncio.gather(*(asyncio.create_task(database.asked.wait()) for _ in range(2)))
    assert [len(batch) for batch in database.batches] == [10]

    waited_enough.set()
    await asyncio.gather(first, *others)
    assert [len(batch) for batch in database.batches] == [10, 10]


async def test_a_caller_whose_crowd_has_gone_soon_waits_no_more(
    database: Database, waits: list[float]
) -> None:
    commits = GroupCommit(database, busy_time=lambda: 0.0)
    await asyncio.gather(*(commits.submit([event()]) for _ in range(8)))
    for _ in range(10):
        await commits.submit([event()])
    # 8, 4, and then no crowd any more.
    assert len(waits) == 2
    assert all(0 < seconds <= 0.002 for seconds in waits)


async def test_a_crowd_is_waited_for_while_the_process_is_busy_with_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[asyncio.Task[Sequence[tuple[UUID, int]]]] = []
    sleep = asyncio.sleep

    async def one_more_comes(_: float) -> None:
        others.append(asyncio.create_task(commits.submit([event()])))
        await sleep(0)

    monkeypatch.setattr("server.events.group_commit.asyncio.sleep", one_more_comes)
    commits = GroupCommit(database, busy_time=lambda: perf_counter() if len(others) < 3 else 0.0)
    await asyncio.gather(*(commits.submit([event()]) for _ in range(8)))

    await commits.submit([event()])

    await asyncio.gather(*others)
    assert [len(batch) for batch in database.batches] == [8, 4]


async def test_a_crowd_is_not_waited_for_for_ever(database: Database) -> None:
    commits = GroupCommit(database, busy_time=perf_counter)
    await asyncio.gather(*(commits.submit([event()]) for _ in range(8)))

    await commits.submit([event()])

    assert [len(batch) for batch in database.batches] == [8, 1]


async def test_a_large_call_waits_for_nobody(database: Database, waits: list[float]) -> None:
    commits = GroupCommit(database)
    await asyncio.gather(*(commits.submit([event()]) for _ in range(8)))
    await commits.submit([event() for _ in range(100)])
    assert waits == []


@pytest.fixture
def in_use_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.events.group_commit._ACTIVE_SECONDS", 60)


@pytest.mark.usefixtures("in_use_for_long")
async def test_what_gives_way_does_so_while_others_are_in_use(
    database: Database, waits: list[float]
) -> None:
    others = GroupCommit(database)
    floods = GroupCommit(database, gives_way_to=[others])
    calls = [[event() for _ in range(100)] for _ in range(9)]

    await asyncio.gather(*(floods.submit(call) for call in calls))
    assert max(map(len, database.batches)) > 200
    assert waits == []

    database.batches.clear()
    await others.submit([event()])
    await asyncio.gather(*(floods.submit(call) for call in calls))
    assert all(len(batch) <= 100 for batch in database.batches)
    # After each of its commits.
    assert len(waits) == len(database.batches) - 1
    assert sum(waits) > 0


@pytest.mark.usefixtures("in_use_for_long")
async def test_what_gives_way_has_one_commit_at_a_time(database: Database) -> None:
    others = GroupCommit(database)
    floods = GroupCommit(database, gives_way_to=[others])
    await others.submit([event()])
    database.batches.clear()
    database.open.clear()
    calls = [asyncio.create_task(floods.submit([event() for _ in range(150)])) for _ in range(3)]
    await asyncio.gather(*(asyncio.create_task(database.asked.wait()) for _ in range(4)))
    assert len(database.batches) == 1
    database.open.set()
    await asyncio.gather(*calls)
    assert len(database.batches) == 3


@pytest.mark.parametrize(
    ("took", "share", "waited", "pause"),
    [(0.01, 0.5, 0, 0.01), (0.01, 0.1, 0, 0.09), (0.1, 0.05, 0.4, 0.6), (0.1, 0.05, 2, 0.1)],
)
def test_a_pause_leaves_others_their_share_and_keeps_nobody_for_long(
    took: float, share: float, waited: float, pause: float
) -> None:
    assert pause_after(took, share, waited) == pytest.approx(pause)
