"""An engine is ready while it reaches the queue."""

from delivery.metrics import EngineMetrics


def test_engine_is_ready_while_it_reaches_the_database() -> None:
    times = iter([100.0, 100.0, 110.0, 110.1])
    metrics = EngineMetrics(times.__next__)

    before = metrics.is_ready
    metrics.database_reached()

    assert (before, metrics.is_ready, metrics.is_ready) == (False, True, False)
