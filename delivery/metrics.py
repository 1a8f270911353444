"""Metrics of one engine. cli/metrics publishes them."""

from collections.abc import Callable
from functools import partial
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from core.lifecycle import DeactivationReason, DeliveryState, Outcome
from core.queue import LeasedDelivery, Settlement

#: An engine without a claim or sweep for this long is not ready. Both run every second.
_READY_SECONDS = 10.0
_MICRO = 1e-6

# Upper bounds of buckets. A delivery has at most 4 attempts by default, and 21 at most. Internal
# errors can add more. A request takes up to 30 s. Waits include retries and backlogs.
_ATTEMPTS = (1, 2, 3, 4, 6, 11, 21)
_STATEMENT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30)
_WAIT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 600, 3600)


class EngineMetrics:
    """The metrics since the process started, registered in `registry`.

    Each label value of a closed set exists from the start, because rate() ignores the first sample
    of a series. The children are looked up once, because labels() costs 1 us per call.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._reached_at = float("-inf")
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)

        attempts = counter("postrider_attempts_total", "Finished attempts.", ["outcome"])
        self._attempts = {outcome: attempts.labels(outcome) for outcome in Outcome}
        deliveries = counter(
            "postrider_deliveries_total", "Deliveries that this process finished.", ["state"]
        )
        self._deliveries = {
            state: deliveries.labels(state)
            for state in (DeliveryState.DELIVERED, DeliveryState.FAILED)
        }
        self._delivery_attempts = histogram(
            "postrider_delivery_attempts", "Attempts of a finished delivery.", buckets=_ATTEMPTS
        )
        durations = histogram(
            "postrider_attempt_duration_seconds",
            "Duration of attempts and their phases.",
            ["phase"],
            buckets=_REQUEST_SECONDS,
        )
        self._dns = durations.labels("dns")
        self._connect = durations.labels("connect")
        self._first_byte = durations.labels("first_byte")
        self._whole = durations.labels("whole")
        self._publish_to_first_attempt = histogram(
            "postrider_publish_to_first_attempt_seconds",
            "Time from when a delivery is due to the start of its first attempt.",
            buckets=_WAIT_SECONDS,
        )
        self._publish_to_delivered = histogram(
            "postrider_publish_to_delivered_seconds",
            "Time from when a delivery is due to the response that delivered it.",
            buckets=_WAIT_SECONDS,
        )
        deactivations = counter(
            "postrider_webhook_deactivations_total",
            "Webhook configs that this process deactivated.",
            ["reason"],
        )
        self.deactivations = {
            reason: deactivations.labels(reason)
            for reason in (DeactivationReason.FAILURES, DeactivationReason.GONE)
        }
        breakers = counter(
            "postrider_breaker_changes_total",
            "Breakers that this process opened or closed.",
            ["to"],
        )
        self.breakers_opened = breakers.labels("open")
        self.breakers_closed = breakers.labels("closed")
        self.leases_reclaimed = counter(
            "postrider_leases_reclaimed_total",
            "Leases that expired without a result and that this process reclaimed.",
        )
        self.leases_lost = counter(
            "postrider_leases_lost_total",
            "Results of this process that came after their lease had expired.",
        )
        self.in_flight = gauge("postrider_in_flight", "Attempts in flight in this process.")
        self.in_flight_limit = gauge(
            "postrider_in_flight_limit", "Limit of the attempts in flight in this process."
        )
        self.claim = histogram(
            "postrider_claim_duration_seconds",
            "Duration of the statement that claims deliveries.",
            buckets=_STATEMENT_SECONDS,
        )
        self.settle = histogram(
            "postrider_settle_duration_seconds",
            "Duration of the statement that records results, including its commit.",
            buckets=_STATEMENT_SECONDS,
        )

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
        self._attempts[result.outcome].inc()
        self._whole.observe(result.duration_us * _MICRO)
        if result.dns_us is not None:
            self._dns.observe(result.dns_us * _MICRO)
        if result.connect_us is not None:
            self._connect.observe(result.connect_us * _MICRO)
        if result.first_byte_us is not None:
            self._first_byte.observe(result.first_byte_us * _MICRO)
        if delivery.attempt_count == 0:
            waited = settlement.started_at - delivery.due_since
            self._publish_to_first_attempt.observe(waited.total_seconds())

    def settled(self, settlement: Settlement) -> None:
        """Count a recorded result. Leases make sure that one engine counts each delivery."""
        state = settlement.final_state
        if state is None:
            return
        self._deliveries[state].inc()
        self._delivery_attempts.observe(settlement.number)
        if state is DeliveryState.DELIVERED:
            took = (settlement.started_at - settlement.due_since).total_seconds()
            self._publish_to_delivered.observe(took + settlement.result.duration_us * _MICRO)
