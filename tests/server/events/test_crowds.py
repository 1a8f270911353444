"""When a merchant's events are looked at more closely."""

from core.queue import BURST_EVENTS
from server.events.ingest import PublishRates


class Clock:
    now = 50.2

    def __call__(self) -> float:
        return self.now


def test_each_merchants_events_of_a_second_are_counted() -> None:
    bursts = PublishRates(Clock())
    bursts.notice(["m_0", "m_1", "m_0"])
    bursts.notice(["m_0"])
    assert bursts.most_of(["m_1"]) == 1
    assert bursts.most_of(["m_1", "m_0", "m_2"]) == 3
    assert bursts.most_of([]) == 0


def test_a_crowd_outlives_its_second_and_thins_out() -> None:
    clock = Clock()
    bursts = PublishRates(clock)
    bursts.notice(["m_0"] * (4 * BURST_EVENTS) + ["m_1"] * BURST_EVENTS)
    counts = []
    for _ in range(4):
        clock.now += 1
        bursts.notice([])
        counts.append((bursts.most_of(["m_0"]), bursts.most_of(["m_1"])))
    assert counts == [(2 * BURST_EVENTS, 0), (BURST_EVENTS, 0), (0, 0), (0, 0)]
