"""An engine is ready while it reaches the queue."""

from delivery.metrics import EngineMetrics


def test_an_engine_is_ready_once_it_has_reached_the_queue_and_while_it_does() -> None:
    times = iter([100.0, 100.0, 100.0, 110.0, 110.1])
    # Made, asked, reached, asked and asked.
    metrics = EngineMetrics(20, times.__next__)

    before = metrics.is_ready
    metrics.database_reached()

    assert (before, metrics.is_ready, metrics.is_ready) == (False, True, False)
