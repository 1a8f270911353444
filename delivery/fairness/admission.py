"""Stage: parked deliveries are let in as their webhook configs have room.

Those that an engine knows to wait for it are refilled as soon as half their places are free, by
chunks. Beside that every engine looks at all backlogs every second, so that nothing depends on what
one of them knows, or on its being alive. Beside others' deliveries both keep to an allowance.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from time import monotonic
from uuid import UUID

from core import queue
from core.backpressure import LoopLag
from core.postgres.protocols import Pool
from core.queue import LeasedDelivery
from delivery.fairness.backlog_rate import BacklogRate

#: A delivery claimed so soon after it was owed is one that backlogs could be in the way of; what
#: comes later waited for something else, such as the end of an outage.
_PROMPT = timedelta(seconds=1)
#: How soon one for which nothing was let in is asked for again by an engine that is busy.
_PATIENCE_SECONDS = 0.1


class Admission:
    """The backlogs that wait for this engine: those it met since the sweep before the last one."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = monotonic):
        self._pool = pool
        self._clock = clock
        self._known: set[UUID] = set()
        self._met: set[UUID] = set()
        self._asked_in_vain: dict[UUID, float] = {}
        self._unclaimed: set[UUID] = set()
        self._allowance = BacklogRate(clock)
        self._loop_lag = LoopLag(self._allowance.aimd)

    def meet(self, webhook_ids: Iterable[UUID]) -> None:
        """These configs have parked deliveries, as a claim found or left them."""
        self._met.update(webhook_ids)
        self._known |= self._met

    def give_way_to(self, claimed: Iterable[LeasedDelivery]) -> None:
        """What a claim brought: those of it that are prompt are to stay so."""
        self._allowance.meet_others(sum(_is_prompt(delivery) for delivery in claimed))

    def concerns(self, webhook_ids: Iterable[UUID | None]) -> bool:
        """Whether one of these configs has parked deliveries, as we know, that may be let in."""
        return not self._known.isdisjoint(webhook_ids) and not self.rest_seconds()

    def rest_seconds(self) -> float:
        """Until a refill may let anything in."""
        return self._allowance.rest_seconds()

    async def refill(self, wanted: Callable[[UUID], int], *, busy: bool = False) -> bool:
        """Let in what the configs that wait for us can take now; whether there was any.

        `wanted` says how many of each. What was let in the last time is still to be claimed, so its
        configs are not asked for. While we are `busy` with what is ready anyway, nor is a config
        that has enough of that.
        """
        if self.rest_seconds():
            # The claim beside us has what was let in the last time.
            self._unclaimed = set()
            return False
        now = self._clock()
        waiting = {w for w in self._known if self._asked_in_vain.get(w, now) > now} if busy else ()
        asked = _hungry(self._known.difference(waiting, self._unclaimed), wanted)
        self._unclaimed = await self._admit(asked)
        again_at = now + _PATIENCE_SECONDS
        self._asked_in_vain |= {w: again_at for w in asked if w not in self._unclaimed}
        self._met |= self._unclaimed
        return bool(self._unclaimed)

    async def sweep(self, wanted: Callable[[UUID], int]) -> bool:
        """The same for every config that has a backlog; whether anything was let in."""
        backlogs = await queue.webhooks_with_backlog(self._pool)
        admitted = await self._admit(_hungry(backlogs, wanted))
        self._known = self._met | admitted
        self._met = set()
        self._asked_in_vain = {}
        return bool(admitted)

    async def _admit(self, places: Mapping[UUID, int]) -> set[UUID]:
        if not places:
            return set()
        if self._allowance.is_bounded:
            self._loop_lag.measure()
        most = self._allowance.chunk()
        admitted = await queue.admit(self._pool, places, most)
        if most is not None:
            self._allowance.spend(max((min(places[w], most) for w in admitted), default=0))
        return admitted


def _hungry(webhook_ids: Iterable[UUID], wanted: Callable[[UUID], int]) -> dict[UUID, int]:
    return {w: count for w in webhook_ids if (count := wanted(w)) > 0}


def _is_prompt(delivery: LeasedDelivery) -> bool:
    """Whether it is one of those that nothing of a backlog is to delay."""
    late = delivery.claimed_at - delivery.due_since
    return not delivery.has_backlog and delivery.attempt_count == 0 and late < _PROMPT
