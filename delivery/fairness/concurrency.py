"""Concurrency limits inside one engine: per webhook config, and in total. Pure but for one wait.

Each config starts with a small limit. A success raises the limit by one and a failure halves it
(AIMD), so endpoints that answer quickly get most of the engine's slots. Slots are shared like this:

- Configs whose last attempt succeeded may use all slots except a reserve of one eighth. The reserve
  serves other configs until the engine notices that a busy endpoint stopped answering.
- Configs without history may hold half of the slots together.
- Failing configs may hold a quarter of the slots together.

After three consecutive failures a config pauses for 50 ms. The pause doubles up to 500 ms, so that
a short outage costs few attempts and its end is noticed quickly.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

#: Limit of a config without history. The reserve never pushes a config below this limit.
INITIAL_LIMIT = 4
#: A config is silent when none of its open attempts has ended for this long.
_SILENT_AFTER_SECONDS = 2.0
_FAILURES_BEFORE_PAUSE = 3
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 0.5
#: Configs that are remembered. Above this number, idle ones lose their history.
_CONFIGS_MAX = 50_000


@dataclass(slots=True)
class _ConfigState:
    limit: int
    open_attempts: int = 0
    last_succeeded: bool = False
    has_history: bool = False
    #: Monotonic time when an attempt last ended, or when the first open one started.
    last_progress_at: float = 0.0
    consecutive_failures: int = 0
    paused_until: float = 0.0


class ConcurrencyLimiter:
    """Counts open attempts per config and adapts each limit to the results.

    `total` is the number of slots of the engine, `maximum` the highest limit of a config.
    """

    def __init__(self, total: int, maximum: int, clock: Callable[[], float] = monotonic):
        self._total = total
        self.reserve = total // 8
        self._maximum = maximum
        self._clock = clock
        self._states: dict[UUID, _ConfigState] = {}
        self._busy: dict[UUID, _ConfigState] = {}
        self._open = 0
        # Open attempts of unproven configs, as of the last refresh() and since.
        self._unproven_open = 0

    def refresh(self) -> None:
        """Recount the slots of unproven configs. Call it before a round of available()."""
        self._unproven_open = sum(
            state.open_attempts for state in self._busy.values() if not self._is_proven(state)
        )

    def available(self, webhook_id: UUID, configured_limit: int) -> int:
        """Return how many attempts may start now. A `configured_limit` of 0 means none is set."""
        state = self._states.get(webhook_id) or self._new_state()
        if state.paused_until and state.paused_until > self._clock():
            return 0
        limit = min(state.limit, self._maximum, configured_limit or self._maximum)
        if self._is_proven(state):
            spare = self._total - self.reserve - self._open
            limit = min(limit, max(INITIAL_LIMIT, state.open_attempts + spare))
            return max(limit - state.open_attempts, 0)
        is_new = not state.has_history and not self._is_silent(state)
        share = max(self._total // (2 if is_new else 4), 1)
        limit = min(limit, INITIAL_LIMIT if self._unproven_open < share // 2 else 1)
        return max(min(limit - state.open_attempts, share - self._unproven_open), 0)

    def admission_size(self, webhook_id: UUID, configured_limit: int) -> int:
        """Return how many deliveries may be ready or open after an admission.

        Returns 0 until half of that number is free, because each admission costs one statement.
        """
        available = self.available(webhook_id, configured_limit)
        slots = available + self.open_attempts(webhook_id)
        return slots if 2 * available >= slots else 0

    def open_attempts(self, webhook_id: UUID) -> int:
        state = self._states.get(webhook_id)
        return state.open_attempts if state else 0

    def started(self, webhook_id: UUID) -> None:
        """Count an attempt that starts."""
        if len(self._states) > _CONFIGS_MAX:
            self._states = dict(self._busy)
        state = self._states.setdefault(webhook_id, self._new_state())
        if not state.open_attempts:
            state.last_progress_at = self._clock()
            self._busy[webhook_id] = state
        if not self._is_proven(state):
            self._unproven_open += 1
        state.open_attempts += 1
        self._open += 1

    def finished(self, webhook_id: UUID, endpoint_works: bool | None) -> float:
        """Record the end of an attempt, and return the pause in seconds that starts now, often 0.

        `endpoint_works` is None if the outcome says nothing about the endpoint.
        """
        state = self._busy[webhook_id]
        state.open_attempts -= 1
        now = state.last_progress_at = self._clock()
        self._open -= 1
        if not state.open_attempts:
            del self._busy[webhook_id]
        if endpoint_works is None:
            return 0.0
        state.has_history = True
        state.last_succeeded = endpoint_works
        if endpoint_works:
            state.limit = min(state.limit + 1, self._maximum)
            state.consecutive_failures, state.paused_until = 0, 0.0
            return 0.0
        state.limit = max(state.limit // 2, 1)
        state.consecutive_failures += 1
        pause = _pause_seconds(state.consecutive_failures)
        state.paused_until = now + pause
        return pause

    def reset_to_probe(self, webhook_id: UUID) -> None:
        """Allow one attempt, because the breaker is half-open. Its result changes the limit."""
        state = self._states.setdefault(webhook_id, self._new_state())
        state.limit = 1
        state.has_history = True
        state.last_succeeded = False
        state.consecutive_failures, state.paused_until = 0, 0.0

    def _new_state(self) -> _ConfigState:
        return _ConfigState(limit=min(INITIAL_LIMIT, self._maximum))

    def _is_proven(self, state: _ConfigState) -> bool:
        return state.last_succeeded and not self._is_silent(state)

    def _is_silent(self, state: _ConfigState) -> bool:
        silent_for = self._clock() - state.last_progress_at
        return state.open_attempts > 0 and silent_for > _SILENT_AFTER_SECONDS


def _pause_seconds(consecutive_failures: int) -> float:
    doublings = consecutive_failures - _FAILURES_BEFORE_PAUSE
    if doublings < 0:
        return 0.0
    # The exponent is limited, because a float overflows after 1,023 doublings.
    return min(_FIRST_PAUSE_SECONDS * 2.0 ** min(doublings, 10), _LONGEST_PAUSE_SECONDS)


#: How long a claim waits for more free slots.
_GATHER_SECONDS = 0.01
#: Results waiting for the database that do not reduce the budget. It is one settle's batch.
_UNRECORDED_FREE = 500


class InFlightBudget:
    """The attempts that an engine may still start.

    It counts running attempts, results that are not recorded, and claims under way. `total` is the
    number of slots, `reserve` those for configs with few open attempts, and `batch` the largest
    claim.
    """

    def __init__(self, total: int, reserve: int, batch: int):
        self._total = total
        self._reserve = reserve
        # A claim takes at most half of the slots, so that two claims can alternate.
        self._batch = min(batch, (total + 1) // 2)
        self._worthwhile = reserve + max(min(batch, total) // 4, 1)
        self._running = self._unrecorded = self._claiming = 0
        self._changed = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """Let claim_size() return at once from now on."""
        self._closed = True
        self._changed.set()

    def attempt_started(self) -> None:
        self._running += 1

    def attempt_ended(self) -> None:
        """Count an attempt whose result is not recorded yet."""
        self._running -= 1
        self._unrecorded += 1
        self._changed.set()

    def results_recorded(self, count: int) -> None:
        self._unrecorded -= count
        self._changed.set()

    @contextmanager
    def claiming(self, count: int) -> Iterator[None]:
        """Reserve slots while a claim is under way, so that another claim does not ask for them."""
        self._claiming += count
        try:
            yield
        finally:
            self._claiming -= count

    async def claim_size(self) -> int:
        """Return how many deliveries to claim, after waiting up to 10 ms for free slots.

        Slots become free one by one, and a claim of one costs almost as much as a claim of many.
        The reserve is used only if no other slot is free, because most of the claimed deliveries
        would have to be parked.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_SECONDS):
                while self._free() < self._worthwhile and not self._closed:
                    self._changed.clear()
                    await self._changed.wait()
        free = self._free()
        unreserved = free - self._reserve
        return min(unreserved if unreserved > 0 else free, self._batch)

    def _free(self) -> int:
        waiting = max(self._unrecorded - _UNRECORDED_FREE, 0)
        return self._total - self._running - self._claiming - waiting
