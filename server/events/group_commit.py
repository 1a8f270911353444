"""Joins the events of concurrent calls into one statement and one commit.

A single call commits at once. Under load, the first call of the next commit waits up to 12 ms for
others, because a commit of one event costs almost as much as a commit of twenty. It waits only
while the process is busy, because other calls are then on their way and waiting costs no time.

Floods have separate commits, which give way while others publish: they are smaller, run one at a
time, and take a share of the time that adapts to event-loop lag (AIMD).
"""

import asyncio
from collections.abc import Callable, Sequence
from time import perf_counter, thread_time
from typing import NamedTuple, Protocol

from core.backpressure import AimdLevel, LoopLag
from core.postgres.pool import CONNECTION_ERRORS, RETRYABLE_ERRORS
from core.queue import NewEvent

#: Events in one statement. One call may have as many.
_EVENTS_MAX = 1000
#: Concurrent commits: PostgreSQL writes one while the server prepares the next.
_COMMITS_MAX = 2
#: After a commit of this many calls, the next call waits for others.
_CALLS_TO_WAIT = 4
#: The wait ends after this time, or when this many events wait.
_GATHER_SECONDS = 0.012
_EVENTS_ENOUGH = 100
#: It also ends when the process was idle for more than 55 % of such an interval.
_CHECK_SECONDS = 0.001
_BUSY = 0.45
#: Events in a commit that gives way.
_FLOOD_EVENTS_MAX = 100
#: Share of the time that such commits take. The pause ends when a call has waited this long.
_SHARE_MIN, _SHARE_MAX = 0.05, 0.2
_FLOOD_WAIT_SECONDS = 1.0
#: Other commits count as active for this long after their last call.
_ACTIVE_SECONDS = 0.25


class Writer[Result](Protocol):
    """Commits events in one statement and returns a result for each, in order."""

    async def commit(self, events: Sequence[NewEvent]) -> Sequence[Result]: ...


class _Call[Result](NamedTuple):
    events: Sequence[NewEvent]
    results: asyncio.Future[Sequence[Result]]
    submitted_at: float


class GroupCommit[Result]:
    """Commits the events of one or more calls together. The events of a call are not split.

    `gives_way_to` are the commits of others, which go first. `busy_time` returns the CPU seconds of
    the event loop's thread.
    """

    def __init__(
        self,
        writer: Writer[Result],
        gives_way_to: "Sequence[GroupCommit[Result]]" = (),
        busy_time: Callable[[], float] = thread_time,
    ):
        self._writer = writer
        self._busy_time = busy_time
        self._gives_way_to = gives_way_to
        self._waiting: list[_Call[Result]] = []
        self._commits: set[asyncio.Task[None]] = set()
        self._committing = 0
        # Whether a commit that has not started takes the waiting calls.
        self._is_gathering = False
        self._called_at = float("-inf")
        self._last_calls = 0
        self._share = AimdLevel(_SHARE_MIN, _SHARE_MAX)
        self._loop_lag = LoopLag(self._share)

    async def submit(self, events: Sequence[NewEvent]) -> Sequence[Result]:
        """Return the results of these events once they are committed.

        The events of a cancelled caller stay in the commit.
        """
        loop = asyncio.get_running_loop()
        self._called_at = loop.time()
        call = _Call(events, loop.create_future(), self._called_at)
        self._waiting.append(call)
        has_slot = self._committing < _COMMITS_MAX and not self._is_gathering
        if has_slot and not (self._committing and self._gives_way()):
            self._committing += 1
            self._is_gathering = True
            task = asyncio.create_task(self._commit_waiting())
            self._commits.add(task)
            task.add_done_callback(self._commits.discard)
        return await call.results

    def _gives_way(self) -> bool:
        now = asyncio.get_running_loop().time()
        return any(now - other._called_at < _ACTIVE_SECONDS for other in self._gives_way_to)

    async def _commit_waiting(self) -> None:
        try:
            await self._commit_until_empty()
        finally:
            # Not when the task is done, because a call in between would not be committed.
            self._committing -= 1

    async def _commit_until_empty(self) -> None:
        while calls := await self._gather():
            # The clock of the loop has a resolution of milliseconds.
            started = perf_counter()
            try:
                await self._commit(calls)
            except Exception as error:
                if len(calls) > 1 and not isinstance(error, RETRYABLE_ERRORS):
                    # The events of one call must not fail the others.
                    for call in calls:
                        await self._commit_alone(call)
                else:
                    if isinstance(error, CONNECTION_ERRORS):
                        # The waiting calls would get the same error after the same wait.
                        calls += self._waiting
                        self._waiting = []
                    for call in calls:
                        _fail(call, error)
            if self._gives_way():
                self._loop_lag.measure()
                took = perf_counter() - started
                await asyncio.sleep(pause_after(took, self._share.level, self._waited()))
            if self._is_gathering:
                return

    async def _gather(self) -> list[_Call[Result]]:
        """Return the calls of the next commit, or none if no call waits."""
        self._is_gathering = True
        try:
            await self._wait_for_calls()
            return self._take()
        finally:
            self._is_gathering = False

    async def _wait_for_calls(self) -> None:
        if self._last_calls < _CALLS_TO_WAIT or not self._waiting:
            return
        while (left := _GATHER_SECONDS - self._waited()) > 0 and not self._are_enough():
            began, busy = perf_counter(), self._busy_time()
            await asyncio.sleep(min(_CHECK_SECONDS, left))
            if self._busy_time() - busy < _BUSY * (perf_counter() - began):
                return

    def _waited(self) -> float:
        """Return how long the first waiting call has waited."""
        now = asyncio.get_running_loop().time()
        return now - self._waiting[0].submitted_at if self._waiting else 0.0

    def _are_enough(self) -> bool:
        return sum(len(call.events) for call in self._waiting) >= _EVENTS_ENOUGH

    async def _commit(self, calls: Sequence[_Call[Result]]) -> None:
        results = await self._writer.commit([event for call in calls for event in call.events])
        begin = 0
        for call in calls:
            end = begin + len(call.events)
            if not call.results.done():
                call.results.set_result(results[begin:end])
            begin = end

    async def _commit_alone(self, call: _Call[Result]) -> None:
        try:
            await self._commit([call])
        except Exception as error:
            _fail(call, error)

    def _take(self) -> list[_Call[Result]]:
        count = size = 0
        limit = _FLOOD_EVENTS_MAX if self._gives_way() else _EVENTS_MAX
        for call in self._waiting:
            size += len(call.events)
            if count and size > limit:
                break
            count += 1
        calls, self._waiting = self._waiting[:count], self._waiting[count:]
        if calls:
            # Halved, because one small commit does not end the load.
            self._last_calls = max(count, self._last_calls // 2)
        return calls


def pause_after(took: float, share: float, waited: float) -> float:
    """Return the pause after a commit, so that commits take this share of the time.

    `took` is the duration of the commit, and `waited` the time that the next call has waited.
    """
    return max(min(took * (1 / share - 1), _FLOOD_WAIT_SECONDS - waited), took)


def _fail[Result](call: _Call[Result], error: Exception) -> None:
    if not call.results.done():
        call.results.set_exception(error)
