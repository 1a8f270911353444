"""Counters and histograms of one engine. cli/metrics publishes them."""

from collections.abc import Callable, Mapping
from time import monotonic

from core.histogram import LONG, REQUEST, SHORT, Histogram
from core.lifecycle import DeactivationReason, DeliveryState, Outcome
from core.queue import LeasedDelivery, Settlement

#: An engine without a claim or sweep for this long is not ready. Both run every second.
_READY_SECONDS = 10.0
#: A delivery has at most 4 attempts by default, and 21 at most. Internal errors can add more.
_ATTEMPTS = (1, 2, 3, 4, 6, 11, 21)
_MICRO = 1e-6


class EngineMetrics:
    """Counts since the process started."""

    def __init__(self, merchants: int, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._reached_at = float("-inf")
        self.attempts = dict.fromkeys(Outcome, 0)
        self.deliveries = {DeliveryState.DELIVERED: 0, DeliveryState.FAILED: 0}
        self.merchants = BusiestMerchants(merchants, clock)
        self.delivery_attempts = Histogram(_ATTEMPTS)
        self.dns = Histogram(REQUEST)
        self.connect = Histogram(REQUEST)
        self.first_byte = Histogram(REQUEST)
        self.whole = Histogram(REQUEST)
        self.publish_to_first_attempt = Histogram(LONG)
        self.publish_to_delivered = Histogram(LONG)
        self.deactivations = {DeactivationReason.FAILURES: 0, DeactivationReason.GONE: 0}
        self.breakers_opened = 0
        self.breakers_closed = 0
        self.leases_reclaimed = 0
        self.leases_lost = 0
        self.in_flight = 0
        self.in_flight_limit = 0
        self.claim = Histogram(SHORT)
        self.settle = Histogram(SHORT)

    def database_reached(self) -> None:
        """Note that a claim or a sweep succeeded."""
        self._reached_at = self._clock()

    @property
    def is_ready(self) -> bool:
        """Whether the engine reached the queue within the last 10 s."""
        return self._clock() - self._reached_at <= _READY_SECONDS

    def attempt_ended(self, delivery: LeasedDelivery, settlement: Settlement) -> None:
        """Count an attempt, whether or not its result is recorded later."""
        result = settlement.result
        self.attempts[result.outcome] += 1
        self.whole.observe(result.duration_us * _MICRO)
        if result.dns_us is not None:
            self.dns.observe(result.dns_us * _MICRO)
        if result.connect_us is not None:
            self.connect.observe(result.connect_us * _MICRO)
        if result.first_byte_us is not None:
            self.first_byte.observe(result.first_byte_us * _MICRO)
        if delivery.attempt_count == 0:
            waited = settlement.started_at - delivery.due_since
            self.publish_to_first_attempt.observe(waited.total_seconds())

    def settled(self, settlement: Settlement) -> None:
        """Count a recorded result. Leases make sure that one engine counts each delivery."""
        state = settlement.final_state
        if state is None:
            return
        self.deliveries[state] += 1
        self.delivery_attempts.observe(settlement.number)
        self.merchants.count(settlement.merchant_id, state)
        if state is DeliveryState.DELIVERED:
            took = (settlement.started_at - settlement.due_since).total_seconds()
            self.publish_to_delivered.observe(took + settlement.result.duration_us * _MICRO)


# Figures of single merchants: of those with the most deliveries lately, and of the rest together.
#
# There may be a hundred thousand merchants, and each of theirs would be a time series for ever.

#: How often it is decided anew who is shown.
_TERM_SECONDS = 60.0
#: Merchants that are told apart in a term; in one with more, those that come later wait.
_CANDIDATES_MAX = 10_000

#: Stands for all merchants that are not shown.
OTHER = "other"

type Tally = dict[DeliveryState, int]


class BusiestMerchants:
    """Counts the finished deliveries of at most `shown` merchants by name.

    Each delivery counts once: for its merchant while that one is shown, else for the rest. A series
    never falls; it begins at 0 and is gone when others have had more for long enough.
    """

    def __init__(self, shown: int, clock: Callable[[], float] = monotonic):
        self._shown = shown
        self._clock = clock
        self._term_ends_at = clock() + _TERM_SECONDS
        self._tallies: dict[str, Tally] = {}
        self._others = _zero()
        # Deliveries in this term, of whomever; and of those shown what is left of terms before.
        self._recent: dict[str, int] = {}
        self._standing: dict[str, float] = {}

    def count(self, merchant_id: str, state: DeliveryState) -> None:
        recent = self._recent
        if merchant_id in recent or len(recent) < _CANDIDATES_MAX:
            recent[merchant_id] = recent.get(merchant_id, 0) + 1
        tally = self._tallies.get(merchant_id)
        if tally is None:
            if len(self._tallies) < self._shown:
                tally = self._tallies[merchant_id] = _zero()
            else:
                tally = self._others
        tally[state] += 1

    def tallies(self) -> Mapping[str, Tally]:
        """By merchant, at most as many as are shown, and `other`; whoever reads it ends a term."""
        if self._clock() >= self._term_ends_at:
            self._choose()
        return {**self._tallies, OTHER: self._others}

    def _choose(self) -> None:
        self._term_ends_at = self._clock() + _TERM_SECONDS
        # A term ago counts half: who is quiet for a moment is not gone at once.
        standing = {merchant: self._standing.get(merchant, 0.0) / 2 for merchant in self._tallies}
        for merchant, count in self._recent.items():
            standing[merchant] = standing.get(merchant, 0.0) + count
        best = sorted(standing, key=lambda merchant: (-standing[merchant], merchant))[: self._shown]
        self._standing = {merchant: standing[merchant] for merchant in best}
        self._tallies = {merchant: self._tallies.get(merchant) or _zero() for merchant in best}
        self._recent = {}


def _zero() -> Tally:
    return {DeliveryState.DELIVERED: 0, DeliveryState.FAILED: 0}
