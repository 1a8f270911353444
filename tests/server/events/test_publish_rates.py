"""When a merchant's events are looked at more closely."""

from core.queue import BURST_EVENTS
from server.events.publish_rates import PublishRates


class Clock:
    now = 50.2

    def __call__(self) -> float:
        return self.now


def test_each_merchants_events_of_a_second_are_counted() -> None:
    bursts = PublishRates(Clock())
    bursts.count(["m_0", "m_1", "m_0"])
    bursts.count(["m_0"])
    assert bursts.highest(["m_1"]) == 1
    assert bursts.highest(["m_1", "m_0", "m_2"]) == 3
    assert bursts.highest([]) == 0


def test_a_crowd_outlives_its_second_and_thins_out() -> None:
    clock = Clock()
    bursts = PublishRates(clock)
    bursts.count(["m_0"] * (4 * BURST_EVENTS) + ["m_1"] * BURST_EVENTS)
    counts = []
    for _ in range(4):
        clock.now += 1
        bursts.count([])
        counts.append((bursts.highest(["m_0"]), bursts.highest(["m_1"])))
    assert counts == [(2 * BURST_EVENTS, 0), (BURST_EVENTS, 0), (0, 0), (0, 0)]
