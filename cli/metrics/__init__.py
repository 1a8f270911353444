"""Metrics of each process for Prometheus, and the HTTP listener. Start at http."""

from prometheus_client import disable_created_metrics

# A `_created` sample would be one more series for each counter and histogram.
disable_created_metrics()  # type: ignore[no-untyped-call]
