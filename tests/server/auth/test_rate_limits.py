"""Rate limits of callers and slots for pings, on a clock that the test moves."""

import random
from contextlib import suppress

import pytest

from core.errors import QuotaExceeded
from server.auth import rate_limits
from server.auth.principal import Principal
from server.auth.rate_limits import CONNECTING, CallerLimits, PingSlots, Rate
from server.settings import ServerSettings
from tests.support.clock import ManualClock
from tests.support.rpcs import methods

PUBLISH = "/postrider.v1.EventService/PublishEvent"
PING = "/postrider.v1.WebhookConfigService/PingWebhookConfig"


def caller(subject: str = "svc", merchant_id: str | None = None) -> Principal:
    return Principal(subject, merchant_id, frozenset(), 0)


def admitted(limits: CallerLimits, who: Principal, method: str = PUBLISH, calls: int = 10) -> int:
    """The number of admitted calls."""
    count = 0
    for _ in range(calls):
        with suppress(QuotaExceeded):
            limits.admit(who, method)
            count += 1
    return count


def test_burst_is_admitted_and_then_the_rate(clock: ManualClock) -> None:
    rate = Rate(10, 5, clock)
    assert [rate.spend("a") for _ in range(5)] == [0.0] * 5
    assert rate.spend("a") == pytest.approx(0.1)
    clock.now += 0.1
    assert rate.spend("a") == 0.0
    assert rate.spend("a") == pytest.approx(0.1)
    clock.now += 3600
    assert [rate.spend("a") for _ in range(5)] == [0.0] * 5
    assert rate.spend("a") > 0


def test_returned_wait_is_enough_and_refusals_cost_nothing(clock: ManualClock) -> None:
    rate = Rate(3, 1, clock)
    assert rate.spend("a") == 0.0
    for _ in range(100):
        wait = rate.spend("a")
        assert wait == pytest.approx(1 / 3, rel=1e-3)
    clock.now += wait
    assert rate.spend("a") == 0.0


def test_calls_in_any_second_are_at_most_burst_plus_rate(clock: ManualClock) -> None:
    rate, times = Rate(50, 20, clock), []
    choice = random.Random(7)  # noqa: S311 - reproducible, not secret
    for _ in range(5000):
        clock.now += choice.expovariate(200)
        if rate.spend("a") == 0.0:
            times.append(clock.now)
    for index, start in enumerate(times):
        within = [moment for moment in times[index:] if moment < start + 1]
        assert len(within) <= 20 + 50 + 1
    assert len(times) >= 50 * (times[-1] - times[0])


def test_zero_means_no_limit(clock: ManualClock) -> None:
    rate = Rate(0, 1, clock)
    assert {rate.spend("a") for _ in range(1000)} == {0.0}


def test_remembered_callers_are_bounded_and_idle_ones_dropped(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limits, "MAX_REMEMBERED_CALLERS", 3)
    rate = Rate(1, 1, clock)
    for key in ("a", "b", "c", "a", "d"):
        rate.spend(key)
    assert len(rate._full_at) == 3
    assert rate.spend("a") > 0
    assert rate.spend("b") == 0.0


def test_each_merchant_and_service_has_its_own_bucket(clock: ManualClock) -> None:
    settings = ServerSettings(merchant_call_burst=3, service_call_burst=7)
    limits = CallerLimits(settings, clock)
    assert admitted(limits, caller("gateway", "m_1")) == 3
    assert admitted(limits, caller("another gateway", "m_1")) == 0
    assert admitted(limits, caller("gateway", "m_2")) == 3
    assert admitted(limits, caller("m_1")) == 7
    assert admitted(limits, caller("gateway")) == 7


def test_calls_that_connect_have_a_smaller_bucket(clock: ManualClock) -> None:
    limits = CallerLimits(ServerSettings(registration_burst=2), clock)
    who = caller("gateway", "m_1")
    assert admitted(limits, who, PING, calls=5) == 2
    assert admitted(limits, who, calls=5) == 5
    clock.now += 1
    assert admitted(limits, who, PING, calls=5) == 1


def test_calls_that_connect_are_rpcs_of_the_contract() -> None:
    known = {f"/{m.containing_service.full_name}/{m.name}" for m in methods()}
    assert known >= CONNECTING
    assert len(CONNECTING) == 3


def test_refusal_has_the_time_until_the_next_call(clock: ManualClock) -> None:
    limits = CallerLimits(ServerSettings(service_call_burst=1, service_call_rate=2), clock)
    limits.admit(caller("svc"), PUBLISH)
    with pytest.raises(QuotaExceeded) as refused:
        limits.admit(caller("svc"), PUBLISH)
    assert refused.value.retry_after_seconds == pytest.approx(0.5)


def test_ping_slots_are_counted_by_merchant_and_released() -> None:
    slots = PingSlots(2)
    with slots.slot("m_1"), slots.slot("m_1"), slots.slot("m_2"):
        with pytest.raises(QuotaExceeded, match="2 pings") as refused, slots.slot("m_1"):
            pass
        assert refused.value.reason == "PINGS_LIMIT"
        assert refused.value.retry_after_seconds == 1.0
    with pytest.raises(RuntimeError), slots.slot("m_1"):
        raise RuntimeError
    assert not slots._used
