"""Counts of the events that each merchant published in the last seconds."""

from core.queue import BURST_EVENTS
from server.events.publish_rates import PublishRates
from tests.support.clock import ManualClock


def test_events_are_counted_per_merchant_and_second() -> None:
    rates = PublishRates(ManualClock(50.2))
    rates.count(["m_0", "m_1", "m_0"])
    rates.count(["m_0"])
    assert rates.highest(["m_1"]) == 1
    assert rates.highest(["m_1", "m_0", "m_2"]) == 3
    assert rates.highest([]) == 0


def test_burst_halves_each_second() -> None:
    clock = ManualClock(50.2)
    rates = PublishRates(clock)
    rates.count(["m_0"] * (4 * BURST_EVENTS) + ["m_1"] * BURST_EVENTS)
    counts = []
    for _ in range(4):
        clock.now += 1
        rates.count([])
        counts.append((rates.highest(["m_0"]), rates.highest(["m_1"])))
    assert counts == [(2 * BURST_EVENTS, 0), (BURST_EVENTS, 0), (0, 0), (0, 0)]
