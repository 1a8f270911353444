"""Settings of the delivery engine alone."""

from pydantic import Field, field_validator, model_validator

from core.settings import Seconds, SecondsList, SettingsBlock, none_when_off

#: Engine processes that one supervisor keeps.
MAX_PROCESSES = 64


class DeliverySettings(SettingsBlock):
    """Deadlines, retries, leases and the bounds of what is in flight."""

    delivery_timeout_seconds: float = Field(
        30.0, gt=0, le=30, description="total time of one attempt, from DNS to the status line"
    )
    max_retries: int = Field(
        3, ge=0, le=20, description="attempts after the first before a delivery has failed"
    )
    retry_schedule_seconds: SecondsList = Field(
        (1.0, 10.0, 60.0),
        min_length=1,
        description="comma-separated waits before each retry, up to a fifth longer by jitter; the "
        "last repeats when there are more retries than waits",
    )
    max_fault_retries: int = Field(
        300,
        ge=0,
        le=10_000,
        description="attempts after those that a fault of Postrider's own broke, such as a missing "
        "encryption key, before a delivery has failed; they use up no other retries, and their "
        "waits double from 1 s to 15 min: 300 are three days",
    )
    max_consecutive_failures: int = Field(
        10,
        ge=1,
        description="failed deliveries in a row after which a webhook config goes inactive",
    )
    breaker_failures: int = Field(
        10,
        ge=1,
        description="failed attempts in a row, of whatever deliveries, after which a webhook "
        "config is left alone for a while and its deliveries wait",
    )
    breaker_failing_seconds: Seconds = Field(
        5.0, description="how long these failures must have gone on before that"
    )
    breaker_cooldown_seconds: Seconds = Field(
        5.0,
        description="for how long it is left alone the first time; then one delivery is tried, and "
        "each failure doubles the wait",
    )
    breaker_cooldown_max_seconds: Seconds = Field(300.0, description="longest of these waits")
    retry_after_max_seconds: Seconds = Field(
        3600.0, description="longest wait that a receiver is granted by its Retry-After"
    )
    lease_seconds: Seconds = Field(
        75.0,
        description="how long an engine owns a claimed delivery; at least twice the delivery "
        "timeout, and what a crash costs before the delivery is sent again",
    )
    max_in_flight: int = Field(
        500, ge=1, le=10_000, description="attempts one engine process has open at once"
    )
    max_in_flight_per_webhook: int = Field(
        32,
        ge=1,
        description="of these, attempts to one webhook config that answers well; what exceeds it "
        "waits, parked, in the config's own backlog",
    )
    claim_batch: int = Field(
        200, ge=1, le=1000, description="most deliveries claimed in one statement"
    )
    poll_seconds: Seconds = Field(
        1.0, le=1.0, description="longest wait between looks at the queue when no hint arrives"
    )
    delivery_drain_seconds: Seconds = Field(
        35.0,
        description="how long attempts in flight may finish after SIGTERM, and at most how long "
        "again the database is waited for to record them",
    )
    delivery_processes: int = Field(
        1,
        ge=1,
        le=MAX_PROCESSES,
        description="engine processes that one `postrider delivery` keeps running, each with its "
        "own places in flight and database connections; one uses at most one core",
    )
    delivery_metrics_address: str | None = Field(
        "127.0.0.1:9465",
        description="host:port where Prometheus finds the metrics of the engines of one `postrider "
        "delivery`, however many, and probes find /live and /ready; `off` for none",
    )
    metrics_merchants: int = Field(
        20,
        ge=0,
        le=1000,
        description="merchants whose deliveries an engine's metrics tell apart: those with the "
        "most lately; the others are one figure",
    )

    _off = field_validator("delivery_metrics_address")(none_when_off)

    @model_validator(mode="after")
    def _lease_outlives_attempt(self) -> "DeliverySettings":
        if self.lease_seconds < 2 * self.delivery_timeout_seconds:
            raise ValueError(
                "WEBHOOK_LEASE_SECONDS must be at least twice WEBHOOK_DELIVERY_TIMEOUT_SECONDS: a "
                "lease that ends during an attempt sends the webhook twice"
            )
        return self
