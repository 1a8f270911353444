"""Joins the events of calls that come together: one statement and one commit for all of them.

A call that comes alone commits at once, and so do a few. Where calls come in crowds, the first of
the next commit waits a little for the others, since a commit for one costs PostgreSQL and us nearly
what one for twenty costs. It waits while this process is busy, which is while others are on their
way: then waiting costs nothing. Once all have come, whoever waits longer waits for nobody.

What comes in floods has commits of its own, which give way: while others publish beside it, they
are smaller, go one at a time, and take a part of the time only, the smaller the later our loop is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter, thread_time
from typing import NamedTuple

from core.backpressure import AimdLevel, LoopLag
from core.postgres.pool import CONNECTION_ERRORS, RETRYABLE_ERRORS
from core.queue import NewEvent

#: Events in one statement; a batch of a single call may be as large.
_EVENTS_MAX = 1000
#: Commits under way at once: one is written by PostgreSQL while we prepare the next.
_COMMITS_MAX = 2
#: A commit that joins as many calls is one of a crowd, ...
_CROWD = 4
#: ... and the next call waits at most so long for its company; unless this many events wait, ...
_COMPANY_SECONDS = 0.012
_EVENTS_ENOUGH = 100
#: ... or the process was busy for a smaller part of as long a look.
_LOOK_SECONDS = 0.001
_BUSY = 0.45
#: Events in a commit that gives way: what others may have to wait for.
_EVENTS_GIVING_WAY = 100
#: What part of the time such commits take: as much as there is room for. But none pauses for long
#: when a call has waited for so long already.
_LEAST_SHARE, _MOST_SHARE = 0.05, 0.2
_WAIT_SECONDS = 1.0
#: Commits are in use for so long after a call.
_IN_USE_SECONDS = 0.25

#: A result for each event, in their order.
type Store[Result] = Callable[[Sequence[NewEvent]], Awaitable[Sequence[Result]]]


class _Call[Result](NamedTuple):
    events: Sequence[NewEvent]
    stored: asyncio.Future[Sequence[Result]]
    at: float


class GroupCommit[Result]:
    """Calls `store` with the events of one or more calls, never of part of one."""

    def __init__(
        self,
        store: Store[Result],
        gives_way_to: "Sequence[GroupCommit[Result]]" = (),
        busy_time: Callable[[], float] = thread_time,
    ):
        """`busy_time` are the seconds that the thread of the loop has computed so far."""
        self._store = store
        self._busy_time = busy_time
        self._gives_way_to = gives_way_to
        self._waiting: list[_Call[Result]] = []
        self._commits: set[asyncio.Task[None]] = set()
        self._committing = 0
        #: Whether a commit that has yet to begin will take those who wait.
        self._is_gathering = False
        self._called_at = float("-inf")
        self._crowd = 0
        self._share = AimdLevel(_LEAST_SHARE, _MOST_SHARE)
        self._loop_lag = LoopLag(self._share)

    async def store(self, events: Sequence[NewEvent]) -> Sequence[Result]:
        """What `store` says of these events, once they are committed.

        A caller that is cancelled does not take its events out of the commit.
        """
        loop = asyncio.get_running_loop()
        self._called_at = loop.time()
        call = _Call(events, loop.create_future(), self._called_at)
        self._waiting.append(call)
        is_room = self._committing < _COMMITS_MAX and not self._is_gathering
        if is_room and not (self._committing and self._gives_way()):
            self._committing += 1
            self._is_gathering = True
            task = asyncio.create_task(self._commit_waiting())
            self._commits.add(task)
            task.add_done_callback(self._commits.discard)
        return await call.stored

    def _gives_way(self) -> bool:
        now = asyncio.get_running_loop().time()
        return any(now - other._called_at < _IN_USE_SECONDS for other in self._gives_way_to)

    async def _commit_waiting(self) -> None:
        try:
            await self._until_nobody_waits()
        finally:
            # Here and not when the task is done: a call that comes in between would be left alone.
            self._committing -= 1

    async def _until_nobody_waits(self) -> None:
        while calls := await self._gather():
            # The loop's own clock counts whole milliseconds.
            began = perf_counter()
            try:
                await self._commit(calls)
            except Exception as error:
                if len(calls) > 1 and not isinstance(error, RETRYABLE_ERRORS):
                    # One call's events must not be the others' error.
                    for call in calls:
                        await self._commit_alone(call)
                else:
                    if isinstance(error, CONNECTION_ERRORS):
                        # Who waits would wait as long again to hear the same.
                        calls += self._waiting
                        self._waiting = []
                    for call in calls:
                        _fail(call, error)
            if self._gives_way():
                self._loop_lag.measure()
                took = perf_counter() - began
                await asyncio.sleep(pause_after(took, self._share.level, self._waited()))
            if self._is_gathering:
                return

    async def _gather(self) -> list[_Call[Result]]:
        """The calls of the next commit, when their company has come; none when nobody waits."""
        self._is_gathering = True
        try:
            await self._await_company()
            return self._take()
        finally:
            self._is_gathering = False

    async def _await_company(self) -> None:
        if self._crowd < _CROWD or not self._waiting:
            return
        while (left := _COMPANY_SECONDS - self._waited()) > 0 and not self._are_enough():
            began, busy = perf_counter(), self._busy_time()
            await asyncio.sleep(min(_LOOK_SECONDS, left))
            if self._busy_time() - busy < _BUSY * (perf_counter() - began):
                return

    def _waited(self) -> float:
        """For how long the first of those who wait has."""
        now = asyncio.get_running_loop().time()
        return now - self._waiting[0].at if self._waiting else 0.0

    def _are_enough(self) -> bool:
        return sum(len(call.events) for call in self._waiting) >= _EVENTS_ENOUGH

    async def _commit(self, calls: Sequence[_Call[Result]]) -> None:
        results = await self._store([event for call in calls for event in call.events])
        begin = 0
        for call in calls:
            end = begin + len(call.events)
            if not call.stored.done():
                call.stored.set_result(results[begin:end])
            begin = end

    async def _commit_alone(self, call: _Call[Result]) -> None:
        try:
            await self._commit([call])
        except Exception as error:
            _fail(call, error)

    def _take(self) -> list[_Call[Result]]:
        count = size = 0
        most = _EVENTS_GIVING_WAY if self._gives_way() else _EVENTS_MAX
        for call in self._waiting:
            size += len(call.events)
            if count and size > most:
                break
            count += 1
        calls, self._waiting = self._waiting[:count], self._waiting[count:]
        if calls:
            # By halves: that few came in time does not mean that the others have gone.
            self._crowd = max(count, self._crowd // 2)
        return calls


def pause_after(took: float, share: float, waited: float) -> float:
    """How long to do nothing after a commit, so that commits take this share of the time; `waited`
    is for how long the next call has."""
    return max(min(took * (1 / share - 1), _WAIT_SECONDS - waited), took)


def _fail[Result](call: _Call[Result], error: Exception) -> None:
    if not call.stored.done():
        call.stored.set_exception(error)
