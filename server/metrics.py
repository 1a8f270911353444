"""Metrics of one server. cli/metrics publishes them."""

from collections.abc import Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: The label of all methods that do not exist, because callers can invent names.
UNKNOWN = "unknown"

# Upper bounds of buckets. A commit holds up to 1,000 events of concurrent calls.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class ServerMetrics:
    """The metrics since the process started, registered in `registry`.

    `methods` maps the path of each method to whether it is a stream. Streams have no duration,
    because they last until their caller leaves.
    """

    def __init__(self, methods: Mapping[str, bool]):
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)

        calls = counter("postrider_rpcs_total", "Finished calls.", ["method", "code"])
        # labels() takes 1 us. Both labels are closed sets.
        self._calls = cache(calls.labels)
        durations = histogram(
            "postrider_rpc_duration_seconds",
            "Duration of calls other than streams.",
            ["method"],
            buckets=_SECONDS,
        )
        #: As Service/Method.
        self._names = {path: path.rpartition(".")[2] for path in methods}
        for name in (*self._names.values(), UNKNOWN):
            self._calls(name, "OK")
        self._durations = {
            path: durations.labels(self._names[path])
            for path, is_stream in methods.items()
            if not is_stream
        }
        events = counter("postrider_events_total", "Published events.", ["result"])
        self.events_accepted = events.labels("accepted")
        self.events_duplicate = events.labels("duplicate")
        self.events_rejected = events.labels("rejected")
        self.commit = histogram(
            "postrider_commit_duration_seconds",
            "Duration of the statement that accepts events, including its commit.",
            buckets=_SECONDS,
        )
        self.commit_events = histogram(
            "postrider_commit_events", "Events that one commit accepts.", buckets=_EVENTS
        )
        self.watchers = Gauge(
            "postrider_watchers", "Open WatchDeliveries streams.", registry=self.registry
        )
        self.database_up = True

    def knows(self, path: str) -> bool:
        """Return whether the method exists."""
        return path in self._names

    def rpc_ended(self, path: str, code: str, seconds: float) -> None:
        """Count a call of /package.Service/Method, whether our code or gRPC set its status."""
        self._calls(self._names.get(path, UNKNOWN), code).inc()
        duration = self._durations.get(path)
        if duration is not None:
            duration.observe(seconds)
