"""The promised figures, and the benchmark of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """A line of the table: the place of its figure, and its minimum or maximum."""

    what: str
    benchmark: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""
    #: The figure of the bare loop, or of the run without the disturbance.
    beside: str = ""

    def kept(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )

    @property
    def limit(self) -> str:
        """The text of the promise. Empty without one."""
        if self.at_most is not None:
            return f"≤ {self.at_most:,g}{self.unit}"
        return f"≥ {self.at_least:,g}{self.unit}" if self.at_least is not None else ""


PROMISES = (
    Promise(
        "delivery engine, durable, over TLS, per process, as part of a bare aiohttp POST loop",
        "deliver",
        "ratio",
        at_least=0.75,
        beside="{rate:,}/s; bare {bare_rate:,}/s",
    ),
    Promise(
        "CPU per delivered webhook, service and PostgreSQL, batch ingest, as multiple of the bare "
        "POST's (0.6 ms where that costs 0.3)",
        "endtoend",
        "cpu_ratio",
        at_most=2,
        beside="{cpu_us_per_webhook} µs; bare {bare_cpu_us} µs",
    ),
    Promise(
        "SQL statements per delivered webhook, ingest to settled",
        "endtoend",
        "statements_per_webhook",
        at_most=0.2,
        beside="{unary_statements_per_webhook} published one by one",
    ),
    Promise(
        "ingest, batches of 100, one server process",
        "ingest",
        "batch_events_per_s",
        at_least=8000,
        unit="/s",
        beside="stream {stream_events_per_s:,}/s",
    ),
    Promise(
        "unary ingest, as part of an empty grpc.aio handler",
        "ingest",
        "unary_ratio",
        at_least=0.7,
        beside="{unary_events_per_s:,}/s; empty {empty_calls_per_s:,}/s; "
        "64 callers, not 128: {unary_ratio_half_the_calls:.3f}",
    ),
    Promise(
        "publish to receipt at 100 events/s, median",
        "endtoend",
        "p50_ms",
        at_most=15,
        unit=" ms",
        beside="at {load70_rate:,}/s: {load70_p50_ms} ms",
    ),
    Promise(
        "the same, 99th percentile",
        "endtoend",
        "p99_ms",
        at_most=50,
        unit=" ms",
        beside="at {load70_rate:,}/s: {load70_p99_ms} ms; 99.9th: {p999_ms} ms",
    ),
    Promise(
        "10 % of the configs never answer: p99 of the healthy, as multiple",
        "neighbours",
        "healthy_p99_ratio",
        at_most=1.5,
        beside="{dead_p99_ms} ms; without {p99_ms} ms",
    ),
    Promise(
        "the same, of the first second, in which they get 50 deliveries each",
        "neighbours",
        "healthy_onset_p99_ratio",
        beside="{dead_onset_p99_ms} ms; without {onset_p99_ms} ms",
    ),
    Promise(
        "the same: throughput of the healthy",
        "neighbours",
        "healthy_throughput_ratio",
        at_least=0.95,
        beside="{dead_rate:,}/s; without {rate:,}/s",
    ),
    Promise(
        "one merchant publishes 100,000 events: p99 of the others, as multiple",
        "neighbours",
        "flood_p99_ratio",
        at_most=1.5,
        beside="{flood_p99_ms} ms; without {p99_ms} ms",
    ),
    Promise(
        "claim with 1,000,000 open deliveries, as multiple of that with 1,000",
        "backlog",
        "claim_ratio",
        at_most=1.5,
        beside="{largest_claim_ms} ms; {smallest_claim_ms} ms for {claimed_at_once}",
    ),
    Promise(
        "drain after an outage, as part of the normal rate",
        "backlog",
        "drain_rate_ratio",
        beside="{drain_rate:,}/s; normal {normal_rate:,}/s",
    ),
    Promise(
        "memory of an engine process with 1,000 requests open",
        "deliver",
        "rss_mb",
        at_most=150,
        unit=" MB",
        beside="{rss_in_flight:,} open at once",
    ),
)
