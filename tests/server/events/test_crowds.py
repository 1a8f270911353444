"""When a merchant's events are looked at more closely."""

from core.queue import CROWD
from server.events.ingest import Crowds


class Clock:
    now = 50.2

    def __call__(self) -> float:
        return self.now


def test_each_merchants_events_of_a_second_are_counted() -> None:
    crowds = Crowds(Clock())
    crowds.notice(["m_0", "m_1", "m_0"])
    crowds.notice(["m_0"])
    assert crowds.most_of(["m_1"]) == 1
    assert crowds.most_of(["m_1", "m_0", "m_2"]) == 3
    assert crowds.most_of([]) == 0


def test_a_crowd_outlives_its_second_and_thins_out() -> None:
    clock = Clock()
    crowds = Crowds(clock)
    crowds.notice(["m_0"] * (4 * CROWD) + ["m_1"] * CROWD)
    counts = []
    for _ in range(4):
        clock.now += 1
        crowds.notice([])
        counts.append((crowds.most_of(["m_0"]), crowds.most_of(["m_1"])))
    assert counts == [(2 * CROWD, 0), (CROWD, 0), (0, 0), (0, 0)]
