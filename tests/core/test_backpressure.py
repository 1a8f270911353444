"""AIMD level and event-loop lag."""

import asyncio

import pytest

from core.backpressure import AimdLevel, LoopLag

PUNCTUAL, LATE = 0.0005, 0.02


def observe(aimd: AimdLevel, lag_seconds: float, times: int) -> float:
    for _ in range(times):
        aimd.observe(lag_seconds)
    return aimd.level


def test_level_grows_from_minimum_to_maximum_while_punctual() -> None:
    aimd = AimdLevel(100, 400)
    assert aimd.level == 100
    assert 100 < observe(aimd, PUNCTUAL, 50) < 400
    assert observe(aimd, PUNCTUAL, 1000) == 400
    aimd.reset()
    assert aimd.level == 100


def test_growth_accelerates_until_a_late_timer() -> None:
    aimd = AimdLevel(1, 1e9)
    first, second = observe(aimd, PUNCTUAL, 500), observe(aimd, PUNCTUAL, 500)
    assert second / first > first > 1
    late = observe(aimd, LATE, 1)
    assert 1 < observe(aimd, PUNCTUAL, 500) / late < second / first


def test_late_timers_halve_the_level_down_to_minimum() -> None:
    aimd = AimdLevel(100, 400)
    observe(aimd, PUNCTUAL, 1000)
    assert 150 < observe(aimd, LATE, 1) < 250
    assert observe(aimd, LATE, 5) == 100


@pytest.mark.parametrize("start", [120, 9_000])
def test_level_settles_where_few_timers_are_late(start: float) -> None:
    """One timer in ten is late above 1,000, and every timer above 2,000."""
    aimd = AimdLevel(100, 10_000)
    aimd.level = start
    levels = []
    for number in range(6000):
        level = aimd.level
        late = level > 2000 or (level > 1000 and number % 10 == 0)
        aimd.observe(LATE if late else PUNCTUAL)
        levels.append(level)
    assert min(levels[3000:]) > 450
    assert max(levels[3000:]) < 1500


class RecordingLevel(AimdLevel):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.lags: list[float] = []
        self.observed = asyncio.Event()
        self.resets = 0

    def observe(self, lag_seconds: float) -> None:
        self.lags.append(lag_seconds)
        self.observed.set()

    def reset(self) -> None:
        self.resets += 1


async def measure_once(lag: LoopLag, level: RecordingLevel) -> None:
    level.observed.clear()
    lag.measure()
    await level.observed.wait()


async def test_busy_loop_is_observed_as_lag() -> None:
    level = RecordingLevel()
    lag = LoopLag(level)
    lag.measure()
    lag.measure()
    # Blocks the loop as a slow handler does.
    until = asyncio.get_running_loop().time() + 0.05
    while asyncio.get_running_loop().time() < until:
        pass
    await level.observed.wait()
    assert len(level.lags) == 1
    assert 0.02 < level.lags[0] < 5


async def test_measuring_stops_without_further_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.backpressure._LINGER_SECONDS", 0.0)
    level = RecordingLevel()
    lag = LoopLag(level)
    await measure_once(lag, level)
    assert not lag.is_measuring
    await measure_once(lag, level)
    assert len(level.lags) == 2
    # Only before the first measurement: the second follows at once.
    assert level.resets == 1


async def test_level_is_reset_after_a_long_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.backpressure._LINGER_SECONDS", 0.0)
    monkeypatch.setattr("core.backpressure._STALE_SECONDS", 0.0)
    level = RecordingLevel()
    lag = LoopLag(level)
    await measure_once(lag, level)
    await measure_once(lag, level)
    assert level.resets == 2
