"""When a merchant's events are looked at more closely."""

from core.queue import CROWD
from server.crowds import Crowds


class Clock:
    now = 50.2

    def __call__(self) -> float:
        return self.now


def test_many_events_of_one_merchant_in_a_second_are_a_crowd_and_of_many_merchants_are_none() -> (
    None
):
    crowds = Crowds(Clock())
    assert not any(crowds.notice([f"m_{n}"]) for n in range(10 * CROWD))
    assert [crowds.notice(["m_0"]) for _ in range(CROWD)] == [False] * (CROWD - 1) + [True]
    assert not crowds.notice(["m_1"])
    assert crowds.notice(["m_1", "m_0"])


def test_a_crowd_outlives_its_second_and_thins_out() -> None:
    clock = Clock()
    crowds = Crowds(clock)
    assert crowds.notice(["m_0"] * (4 * CROWD))
    crowd = []
    for _ in range(3):
        clock.now += 1
        crowd.append(crowds.notice(["m_0"]))
    assert crowd == [True, True, False]
