"""Admits parked deliveries as slots of their webhook configs become free.

An engine refills the backlogs that it knows as soon as half of a config's slots are free. Besides,
every engine reads all backlogs once a second, so that no backlog depends on one engine. While other
merchants' deliveries start promptly, `BacklogRate` limits both.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from time import monotonic
from uuid import UUID

from core import queue
from core.backpressure import LoopLag
from core.postgres.protocols import Executor
from core.queue import LeasedDelivery
from delivery.fairness.backlog_rate import BacklogRate

#: A delivery claimed within this time after it became due could be delayed by backlogs. A later one
#: waited for something else, such as the end of an outage.
_PROMPT = timedelta(seconds=1)
#: A busy engine asks again this long after an admission that found nothing to admit.
_ASK_AGAIN_SECONDS = 0.1


class Admission:
    """The backlogs that this engine refills: those it met since the sweep before the last one."""

    def __init__(self, database: Executor, clock: Callable[[], float] = monotonic):
        self._database = database
        self._clock = clock
        self._known: set[UUID] = set()
        self._met: set[UUID] = set()
        self._ask_again_at: dict[UUID, float] = {}
        self._unclaimed: set[UUID] = set()
        self._rate = BacklogRate(clock)
        self._loop_lag = LoopLag(self._rate.aimd)

    def backlogs_met(self, webhook_ids: Iterable[UUID]) -> None:
        """Remember configs that have parked deliveries."""
        self._met.update(webhook_ids)
        self._known |= self._met

    def claimed(self, deliveries: Iterable[LeasedDelivery]) -> None:
        """Count the prompt deliveries of a claim, which backlogs must not delay."""
        self._rate.others_started(sum(_is_prompt(delivery) for delivery in deliveries))

    def can_refill(self, webhook_ids: Iterable[UUID]) -> bool:
        """Return whether one of these configs has a known backlog that may be admitted now."""
        return not self._known.isdisjoint(webhook_ids) and not self.seconds_until_next()

    def seconds_until_next(self) -> float:
        """Return the seconds until the rate allows an admission."""
        return self._rate.seconds_until_next()

    async def refill(self, admission_size: Callable[[UUID], int], *, busy: bool = False) -> bool:
        """Admit deliveries of the known backlogs, and return whether there were any.

        `admission_size` is the number of deliveries that a config may have ready or open.
        Deliveries of the previous refill are not claimed yet, so their configs are skipped. A busy
        engine also skips configs that had nothing to admit just now.
        """
        if self.seconds_until_next():
            # The claim that runs beside this call takes the deliveries of the previous refill.
            self._unclaimed = set()
            return False
        now = self._clock()
        waiting = {w for w in self._known if self._ask_again_at.get(w, now) > now} if busy else ()
        wanted = _positive(self._known.difference(waiting, self._unclaimed), admission_size)
        self._unclaimed = await self._admit(wanted)
        again_at = now + _ASK_AGAIN_SECONDS
        self._ask_again_at |= {w: again_at for w in wanted if w not in self._unclaimed}
        self._met |= self._unclaimed
        return bool(self._unclaimed)

    async def sweep(self, admission_size: Callable[[UUID], int]) -> bool:
        """Do the same for every config that has a backlog."""
        backlogs = await queue.webhooks_with_backlog(self._database)
        admitted = await self._admit(_positive(backlogs, admission_size))
        self._known = self._met | admitted
        self._met = set()
        self._ask_again_at = {}
        return bool(admitted)

    async def _admit(self, slots: Mapping[UUID, int]) -> set[UUID]:
        if not slots:
            return set()
        if self._rate.is_limited:
            self._loop_lag.measure()
        most = self._rate.chunk_size()
        admitted = await queue.admit(self._database, slots, most)
        if most is not None:
            self._rate.admitted(max((min(slots[w], most) for w in admitted), default=0))
        return admitted


def _positive(
    webhook_ids: Iterable[UUID], admission_size: Callable[[UUID], int]
) -> dict[UUID, int]:
    return {w: count for w in webhook_ids if (count := admission_size(w)) > 0}


def _is_prompt(delivery: LeasedDelivery) -> bool:
    late = delivery.claimed_at - delivery.due_since
    return not delivery.has_backlog and delivery.attempt_count == 0 and late < _PROMPT
