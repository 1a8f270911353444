"""All metrics by name. docs/operate/metrics.md explains each; a test compares the two.

A family is made of plain figures at the moment of a scrape. Label values that are a closed set are
there from the start, at 0, so that a rate sees the first of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.metrics_core import Metric

from core.histogram import Histogram

type Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric; `name` is as it is queried, but for the endings of a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: Labels
    meaning: str

    def of[L: Labels](self, figures: Mapping[L, float | Histogram]) -> Metric:
        """The figures by the values of the labels, in their order; {} for none at present."""
        metric = Metric(self.name.removesuffix("_total"), self.meaning, self.kind)
        for values, figure in figures.items():
            labels = dict(zip(self.labels, values, strict=True))
            if isinstance(figure, Histogram):
                _add_histogram(metric, labels, figure)
            else:
                metric.add_sample(self.name, labels, figure)
        return metric

    def one(self, figure: float | Histogram | None) -> Metric:
        """Of a metric without labels; None for no figure at present."""
        return self.of({} if figure is None else {(): figure})


def _add_histogram(metric: Metric, labels: dict[str, str], histogram: Histogram) -> None:
    below = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        below += count
        le = "+Inf" if bound == float("inf") else str(float(bound))
        metric.add_sample(f"{metric.name}_bucket", labels | {"le": le}, below)
    metric.add_sample(f"{metric.name}_count", labels, below)
    metric.add_sample(f"{metric.name}_sum", labels, histogram.total)


ATTEMPTS = Family(
    "postrider_attempts_total", "counter", ("outcome",), "Attempts that ended, by outcome."
)
DELIVERIES = Family(
    "postrider_deliveries_total", "counter", ("state",), "Deliveries that this process finished."
)
DELIVERY_ATTEMPTS = Family(
    "postrider_delivery_attempts", "histogram", (), "Attempts that a finished delivery took."
)
ATTEMPT_DURATION = Family(
    "postrider_attempt_duration_seconds",
    "histogram",
    ("phase",),
    "How long attempts and their phases took.",
)
PUBLISH_TO_FIRST_ATTEMPT = Family(
    "postrider_publish_to_first_attempt_seconds",
    "histogram",
    (),
    "From when a delivery was owed to the start of its first attempt.",
)
PUBLISH_TO_DELIVERED = Family(
    "postrider_publish_to_delivered_seconds",
    "histogram",
    (),
    "From when a delivery was owed to the answer that delivered it.",
)
DEACTIVATIONS = Family(
    "postrider_webhook_deactivations_total",
    "counter",
    ("reason",),
    "Webhook configs that this process deactivated.",
)
BREAKER_CHANGES = Family(
    "postrider_breaker_changes_total",
    "counter",
    ("to",),
    "Breakers that this process opened or closed.",
)
LEASES_RECLAIMED = Family(
    "postrider_leases_reclaimed_total",
    "counter",
    (),
    "Leases that ended without a result and were taken back by this process.",
)
LEASES_LOST = Family(
    "postrider_leases_lost_total",
    "counter",
    (),
    "Results of this process that came after the end of their lease.",
)
IN_FLIGHT = Family("postrider_in_flight", "gauge", (), "Attempts under way in this process.")
IN_FLIGHT_LIMIT = Family(
    "postrider_in_flight_limit", "gauge", (), "Attempts that this process may have under way."
)
CLAIM_DURATION = Family(
    "postrider_claim_duration_seconds", "histogram", (), "How long a claim's statement took."
)
SETTLE_DURATION = Family(
    "postrider_settle_duration_seconds",
    "histogram",
    (),
    "How long the statement that records results took, with its commit.",
)
QUEUE_DELIVERIES = Family(
    "postrider_queue_deliveries", "gauge", ("state",), "Open deliveries in the database."
)
QUEUE_OLDEST_DUE_AGE = Family(
    "postrider_queue_oldest_due_age_seconds",
    "gauge",
    (),
    "For how long the oldest delivery has been due that waits for nothing but an engine.",
)
WEBHOOK_CONFIGS = Family(
    "postrider_webhook_configs", "gauge", ("status",), "Webhook configs in the database."
)
BREAKERS = Family(
    "postrider_breakers", "gauge", ("state",), "Webhook configs with a backlog and such a breaker."
)
PARTITION_DAYS_AHEAD = Family(
    "postrider_partition_days_ahead",
    "gauge",
    (),
    "Whole days after today for which every partitioned table has partitions.",
)
RETENTION_LAST_RUN = Family(
    "postrider_retention_last_run_timestamp_seconds",
    "gauge",
    (),
    "When retention was last completed, by the database.",
)
CLOCK_SKEW = Family(
    "postrider_clock_skew_seconds", "gauge", (), "This process's clock minus the database's."
)
ENGINE_UP = Family(
    "postrider_engine_up",
    "gauge",
    ("engine",),
    "Whether the engine told its supervisor its figures.",
)
RPCS = Family("postrider_rpcs_total", "counter", ("method", "code"), "Calls that were answered.")
RPC_DURATION = Family(
    "postrider_rpc_duration_seconds",
    "histogram",
    ("method",),
    "How long calls took that are no streams.",
)
EVENTS = Family("postrider_events_total", "counter", ("result",), "Events that were published.")
COMMIT_DURATION = Family(
    "postrider_commit_duration_seconds",
    "histogram",
    (),
    "How long the statement took that accepts events.",
)
COMMIT_EVENTS = Family(
    "postrider_commit_events", "histogram", (), "Events that one such statement accepts."
)
JWKS_AGE = Family(
    "postrider_jwks_age_seconds", "gauge", (), "Since the issuer's key set was last fetched well."
)
WATCHERS = Family("postrider_watchers", "gauge", (), "Open WatchDeliveries streams.")
DATABASE_UP = Family("postrider_database_up", "gauge", (), "Whether the database answers.")
POOL_CONNECTIONS = Family(
    "postrider_database_pool_connections", "gauge", ("state",), "Connections of the hot pool."
)
POOL_SIZE = Family(
    "postrider_database_pool_size", "gauge", (), "Connections that the hot pool may have."
)
STATEMENTS = Family(
    "postrider_statements_total", "counter", (), "SQL statements sent on the hot pool."
)
BUILD_INFO = Family("postrider_build_info", "gauge", ("version",), "The release; always 1.")
