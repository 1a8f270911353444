"""How far a process holds itself back, and how it hears that it should."""

import asyncio

import pytest

from core.backpressure import AimdLevel, LoopLag

PUNCTUAL, LATE = 0.0005, 0.02


def feel(aimd: AimdLevel, late_seconds: float, times: int) -> float:
    for _ in range(times):
        aimd.felt(late_seconds)
    return aimd.level


def test_it_begins_with_the_least_and_grows_up_to_the_most_while_timers_are_punctual() -> None:
    aimd = AimdLevel(100, 400)
    assert aimd.level == 100
    assert 100 < feel(aimd, PUNCTUAL, 50) < 400
    assert feel(aimd, PUNCTUAL, 1000) == 400


def test_the_longer_no_timer_was_late_the_faster_it_grows() -> None:
    aimd = AimdLevel(1, 1e9)
    first, second = feel(aimd, PUNCTUAL, 500), feel(aimd, PUNCTUAL, 500)
    assert second / first > first > 1
    feel(aimd, LATE, 1)
    late = aimd.level
    assert 1 < feel(aimd, PUNCTUAL, 500) / late < second / first


def test_late_timers_take_it_down_much_faster_and_never_below_the_least() -> None:
    aimd = AimdLevel(100, 400)
    feel(aimd, PUNCTUAL, 1000)
    assert 150 < feel(aimd, LATE, 1) < 250
    assert feel(aimd, LATE, 5) == 100


@pytest.mark.parametrize("begins", [120, 9_000])
def test_it_ends_where_few_timers_are_late(begins: float) -> None:
    """The machine bears 1,000; one timer in ten is late beyond that, and beyond 2,000 each."""
    aimd = AimdLevel(100, 10_000)
    aimd.level = begins
    levels = []
    for number in range(6000):
        level = aimd.level
        late = level > 2000 or (level > 1000 and number % 10 == 0)
        aimd.felt(LATE if late else PUNCTUAL)
        levels.append(level)
    settled = levels[3000:]
    assert min(settled) > 450
    assert max(settled) < 1500


def test_it_begins_anew_with_the_least() -> None:
    aimd = AimdLevel(100, 400)
    feel(aimd, PUNCTUAL, 1000)
    aimd.reset()
    assert aimd.level == 100


class Ear(AimdLevel):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.heard: list[float] = []
        self.first = asyncio.Event()
        self.began_anew = 0

    def felt(self, late_seconds: float) -> None:
        self.heard.append(late_seconds)
        self.first.set()

    def reset(self) -> None:
        self.began_anew += 1


async def test_a_loop_that_was_at_something_else_is_late() -> None:
    ear = Ear()
    delay = LoopLag(ear)
    delay.want()
    delay.want()
    # As a handler that takes its time: nothing else of the loop can run.
    until = asyncio.get_running_loop().time() + 0.05
    while asyncio.get_running_loop().time() < until:
        pass
    await ear.first.wait()
    assert len(ear.heard) == 1
    assert 0.02 < ear.heard[0] < 5


async def test_nothing_is_timed_any_more_once_nobody_wants_to_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("core.backpressure._LINGER_SECONDS", 0.0)
    ear = Ear()
    delay = LoopLag(ear)
    delay.want()
    await ear.first.wait()
    assert not delay.is_timing
    ear.first.clear()
    delay.want()
    await ear.first.wait()
    assert len(ear.heard) == 2
    # Between the two was no time to forget in; before the first was all there was.
    assert ear.began_anew == 1


async def test_what_was_told_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.backpressure._LINGER_SECONDS", 0.0)
    monkeypatch.setattr("core.backpressure._STALE_SECONDS", 0.0)
    ear = Ear()
    delay = LoopLag(ear)
    for _ in range(2):
        ear.first.clear()
        delay.want()
        await ear.first.wait()
    assert ear.began_anew == 2
