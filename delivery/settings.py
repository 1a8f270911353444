"""Settings of the delivery engine."""

from pydantic import Field, field_validator, model_validator

from core.settings import Seconds, SecondsList, SettingsBlock, none_when_off

#: Engine processes of one supervisor.
MAX_PROCESSES = 64


class DeliverySettings(SettingsBlock):
    """Deadlines, retries, leases and limits of open attempts."""

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
        description="retries after internal errors, such as a missing encryption key, before a "
        "delivery fails; they use up no other retries, and their waits double from 1 s to 15 min, "
        "so that 300 take three days",
    )
    max_consecutive_failures: int = Field(
        10,
        ge=1,
        description="consecutive failed deliveries after which a webhook config becomes inactive",
    )
    breaker_failures: int = Field(
        10,
        ge=1,
        description="consecutive failed attempts of a webhook config, of any deliveries, after "
        "which its breaker opens and its deliveries wait",
    )
    breaker_failing_seconds: Seconds = Field(
        5.0, description="minimum duration of these failures before the breaker opens"
    )
    breaker_cooldown_seconds: Seconds = Field(
        5.0,
        description="first time for which a breaker stays open; then one delivery is tried, and "
        "each failure doubles the time",
    )
    breaker_cooldown_max_seconds: Seconds = Field(
        300.0, description="longest time for which a breaker stays open"
    )
    retry_after_max_seconds: Seconds = Field(
        3600.0, description="longest Retry-After of a receiver that is honoured"
    )
    lease_seconds: Seconds = Field(
        75.0,
        description="how long an engine owns a claimed delivery, and the delay of its deliveries "
        "after a crash; at least twice the delivery timeout",
    )
    max_in_flight: int = Field(
        500, ge=1, le=10_000, description="open attempts of one engine process"
    )
    max_in_flight_per_webhook: int = Field(
        32,
        ge=1,
        description="open attempts to one webhook config that answers well; further deliveries "
        "wait in the config's own backlog",
    )
    claim_batch: int = Field(
        200, ge=1, le=1000, description="most deliveries that one statement claims"
    )
    poll_seconds: Seconds = Field(
        1.0, le=1.0, description="longest wait between two claims without a notification"
    )
    delivery_drain_seconds: Seconds = Field(
        35.0,
        description="time for open attempts to finish after SIGTERM; recording their results may "
        "take as long again",
    )
    delivery_processes: int = Field(
        1,
        ge=1,
        le=MAX_PROCESSES,
        description="engine processes that one `postrider delivery` keeps running, each with its "
        "own slots and database connections; one uses at most one core",
    )
    delivery_metrics_address: str | None = Field(
        "127.0.0.1:9465",
        description="host:port of the HTTP listener for /metrics, /live and /ready of all engines "
        "of one `postrider delivery`; `off` for none",
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
