"""How many attempts each config may have open, by its results so far."""

from uuid import UUID, uuid4

from delivery.fairness.concurrency import INITIAL_LIMIT, ConcurrencyLimiter
from tests.support.clock import ManualClock

ONE, OTHER = uuid4(), uuid4()


def available(slots: ConcurrencyLimiter, webhook_id: UUID, configured_limit: int = 0) -> int:
    slots.refresh()
    return slots.available(webhook_id, configured_limit)


def fill(slots: ConcurrencyLimiter, webhook_id: UUID) -> int:
    """Start as many attempts as allowed, and return the number of open attempts."""
    while available(slots, webhook_id):
        slots.started(webhook_id)
    return slots.open_attempts(webhook_id)


def end_all(slots: ConcurrencyLimiter, webhook_id: UUID, endpoint_works: bool | None) -> None:
    for _ in range(slots.open_attempts(webhook_id)):
        slots.finished(webhook_id, endpoint_works)


def prove(slots: ConcurrencyLimiter, webhook_id: UUID, rounds: int = 6) -> None:
    for _ in range(rounds):
        fill(slots, webhook_id)
        end_all(slots, webhook_id, endpoint_works=True)


def test_limit_doubles_each_round_of_successes() -> None:
    slots = ConcurrencyLimiter(500, 32)
    opened = []
    for _ in range(5):
        opened.append(fill(slots, ONE))
        end_all(slots, ONE, endpoint_works=True)
    assert opened == [4, 8, 16, 32, 32]


def test_failure_halves_limit_and_success_adds_one() -> None:
    slots = ConcurrencyLimiter(500, 32)
    prove(slots, ONE)
    opened = []
    for endpoint_works in (False, False, False, True, False, False, False, False, True, True):
        slots.started(ONE)
        slots.finished(ONE, endpoint_works)
        # available() is lower, because a config that failed last shares a quarter of the slots.
        opened.append(slots._states[ONE].limit)
    assert opened == [16, 8, 4, 5, 2, 1, 1, 1, 2, 3]


def test_outcome_none_keeps_limit() -> None:
    slots = ConcurrencyLimiter(500, 32)
    prove(slots, ONE)
    fill(slots, ONE)
    end_all(slots, ONE, endpoint_works=None)
    assert available(slots, ONE) == 32


def test_limit_respects_config_and_operator_maximum() -> None:
    slots = ConcurrencyLimiter(500, 10)
    prove(slots, ONE)
    assert available(slots, ONE) == available(slots, ONE, configured_limit=1000) == 10
    assert available(slots, ONE, configured_limit=3) == 3
    assert available(ConcurrencyLimiter(500, 2), ONE) == 2


def test_configs_without_history_share_half_of_the_slots() -> None:
    slots = ConcurrencyLimiter(100, 32)
    held = [fill(slots, uuid4()) for _ in range(200)]
    assert sum(held) == 50
    # After half of that share is used, each further config gets one slot.
    assert held[:8] == [INITIAL_LIMIT] * 6 + [1, 1]
    assert held[32] == 0


def test_attempts_after_refresh_count_at_once() -> None:
    slots = ConcurrencyLimiter(100, 32)
    slots.refresh()
    for _ in range(200):
        webhook_id = uuid4()
        while slots.available(webhook_id, 0):
            slots.started(webhook_id)
    assert sum(slots.open_attempts(webhook_id) for webhook_id in slots._busy) == 50


def test_failing_configs_share_a_quarter_of_the_slots() -> None:
    slots = ConcurrencyLimiter(100, 32)
    dead = [uuid4() for _ in range(100)]
    for webhook_id in dead:
        slots.started(webhook_id)
        slots.finished(webhook_id, endpoint_works=False)
    assert sum(fill(slots, webhook_id) for webhook_id in dead) == 25
    assert fill(slots, ONE) == 1
    assert available(slots, dead[-1]) == 0


def test_proven_config_keeps_its_slots_beside_silent_ones() -> None:
    slots = ConcurrencyLimiter(100, 32)
    prove(slots, ONE)
    for _ in range(200):
        fill(slots, uuid4())
    assert fill(slots, ONE) == 32


def test_config_is_silent_after_two_seconds() -> None:
    clock = ManualClock()
    slots = ConcurrencyLimiter(64, 32, clock)
    prove(slots, ONE)
    prove(slots, OTHER)
    slots.started(ONE)
    clock.now += 1.9
    assert available(slots, ONE) == 31
    clock.now += 0.2
    assert available(slots, ONE) == INITIAL_LIMIT - 1
    assert available(slots, OTHER) == 32
    # A late success proves it again.
    slots.finished(ONE, endpoint_works=True)
    assert available(slots, ONE) == 32


def test_reserve_stays_free_when_proven_configs_hang() -> None:
    clock = ManualClock()
    slots = ConcurrencyLimiter(64, 32, clock)
    hanging = [uuid4() for _ in range(8)]
    for webhook_id in (*hanging, ONE):
        prove(slots, webhook_id)
    held = [fill(slots, webhook_id) for webhook_id in hanging[:3]]
    assert held == [32, 24, INITIAL_LIMIT]
    assert fill(slots, ONE) == INITIAL_LIMIT
    end_all(slots, ONE, endpoint_works=True)
    clock.now += 3
    assert [fill(slots, webhook_id) for webhook_id in hanging[3:]] == [INITIAL_LIMIT] * 5
    assert available(slots, hanging[0]) == 0


def test_admission_size_is_zero_until_half_is_free() -> None:
    slots = ConcurrencyLimiter(500, 8)
    prove(slots, ONE)
    sizes = []
    for _ in range(8):
        slots.started(ONE)
        slots.refresh()
        sizes.append(slots.admission_size(ONE, 0))
    assert sizes == [8, 8, 8, 8, 0, 0, 0, 0]
    assert slots.admission_size(OTHER, 0) == INITIAL_LIMIT
    for _ in range(1000):
        fill(slots, uuid4())
    slots.refresh()
    assert slots.admission_size(uuid4(), 0) == 0


def test_probe_starts_with_one_slot_and_grows() -> None:
    slots = ConcurrencyLimiter(500, 32)
    prove(slots, ONE)
    slots.reset_to_probe(ONE)
    opened = []
    for _ in range(4):
        opened.append(fill(slots, ONE))
        end_all(slots, ONE, endpoint_works=True)
    assert opened == [1, 2, 4, 8]


def test_pause_doubles_up_to_half_a_second() -> None:
    clock = ManualClock()
    slots = ConcurrencyLimiter(500, 32, clock)
    pauses = []
    for _ in range(8):
        slots.started(ONE)
        pauses.append(slots.finished(ONE, endpoint_works=False))
        clock.now += 0.9 * pauses[-1]
        assert (available(slots, ONE) == 0) is (pauses[-1] > 0)
        clock.now += 0.2 * pauses[-1]
        assert available(slots, ONE) > 0
    assert pauses == [0, 0, 0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    assert available(slots, OTHER) == INITIAL_LIMIT


def test_success_or_probe_ends_pause() -> None:
    clock = ManualClock()
    slots = ConcurrencyLimiter(500, 32, clock)

    def fail_thrice() -> None:
        for _ in range(4):
            slots.started(ONE)
        for _ in range(3):
            slots.finished(ONE, endpoint_works=False)
        assert available(slots, ONE) == 0

    fail_thrice()
    assert slots.finished(ONE, endpoint_works=None) == 0
    assert available(slots, ONE) == 0
    slots.reset_to_probe(ONE)
    assert available(slots, ONE) == 1
    fail_thrice()
    assert slots.finished(ONE, endpoint_works=True) == 0
    assert available(slots, ONE) > 0
    slots.started(ONE)
    # The success reset the failures, so that one more causes no pause.
    assert slots.finished(ONE, endpoint_works=False) == 0


def test_remembered_configs_are_bounded() -> None:
    slots = ConcurrencyLimiter(500, 32)
    prove(slots, ONE)
    slots.started(ONE)
    for _ in range(60_000):
        webhook_id = uuid4()
        slots.started(webhook_id)
        slots.finished(webhook_id, endpoint_works=True)
    assert len(slots._states) <= 50_001
    assert slots.open_attempts(ONE) == 1
    slots.finished(ONE, endpoint_works=True)
    assert slots.open_attempts(ONE) == 0
