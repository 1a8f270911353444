"""An engine is ready while it reaches the queue."""

from delivery.metrics import EngineMeasures


def test_an_engine_is_ready_once_it_has_reached_the_queue_and_while_it_does() -> None:
    times = iter([100.0, 100.0, 100.0, 110.0, 110.1])
    # Made, asked, reached, asked and asked.
    measures = EngineMeasures(20, times.__next__)

    before = measures.is_ready
    measures.database_reached()

    assert (before, measures.is_ready, measures.is_ready) == (False, True, False)
