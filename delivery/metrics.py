"""Counters and histograms of one engine. cli/metrics publishes them."""

from collections.abc import Callable
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

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._reached_at = float("-inf")
        self.attempts = dict.fromkeys(Outcome, 0)
        self.deliveries = {DeliveryState.DELIVERED: 0, DeliveryState.FAILED: 0}
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
        if state is DeliveryState.DELIVERED:
            took = (settlement.started_at - settlement.due_since).total_seconds()
            self.publish_to_delivered.observe(took + settlement.result.duration_us * _MICRO)
