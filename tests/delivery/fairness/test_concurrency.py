"""Who may have how many attempts open, by what they have shown."""

from uuid import UUID, uuid4

from delivery.fairness.concurrency import FEW, ConcurrencyLimiter

ONE, OTHER = uuid4(), uuid4()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def free(places: ConcurrencyLimiter, webhook_id: UUID, own_cap: int = 0) -> int:
    places.survey()
    return places.free(webhook_id, own_cap)


def fill(places: ConcurrencyLimiter, webhook_id: UUID) -> int:
    """Begin as many as may; returns how many are open then."""
    while free(places, webhook_id):
        places.begin(webhook_id)
    return places.open(webhook_id)


def end_all(places: ConcurrencyLimiter, webhook_id: UUID, works: bool | None) -> None:
    for _ in range(places.open(webhook_id)):
        places.end(webhook_id, works)


def prove(places: ConcurrencyLimiter, webhook_id: UUID, rounds: int = 6) -> None:
    for _ in range(rounds):
        fill(places, webhook_id)
        end_all(places, webhook_id, works=True)


def test_a_healthy_config_has_all_its_places_within_a_few_round_trips() -> None:
    places = ConcurrencyLimiter(500, 32)
    opened = []
    for _ in range(5):
        opened.append(fill(places, ONE))
        end_all(places, ONE, works=True)
    assert opened == [4, 8, 16, 32, 32]


def test_each_failure_takes_half_down_to_one_and_each_success_gives_one_back() -> None:
    places = ConcurrencyLimiter(500, 32)
    prove(places, ONE)
    opened = []
    for works in (False, False, False, True, False, False, False, False, True, True):
        places.begin(ONE)
        places.end(ONE, works)
        # Its own limit: what it may have while it is not proven is bounded by other things, too.
        opened.append(places._standings[ONE].limit)
    assert opened == [16, 8, 4, 5, 2, 1, 1, 1, 2, 3]


def test_what_says_nothing_of_the_receiver_changes_nothing() -> None:
    places = ConcurrencyLimiter(500, 32)
    prove(places, ONE)
    fill(places, ONE)
    end_all(places, ONE, works=None)
    assert free(places, ONE) == 32


def test_the_caps_of_the_config_and_of_the_operator_hold() -> None:
    places = ConcurrencyLimiter(500, 10)
    prove(places, ONE)
    assert free(places, ONE) == free(places, ONE, own_cap=1000) == 10
    assert free(places, ONE, own_cap=3) == 3
    assert free(ConcurrencyLimiter(500, 2), ONE) == 2


def test_those_that_never_answered_hold_half_of_the_places_however_many_they_are() -> None:
    places = ConcurrencyLimiter(100, 32)
    held = [fill(places, uuid4()) for _ in range(200)]
    assert sum(held) == 50
    # The first come has few; once half of that half is gone, each has one.
    assert held[:8] == [FEW] * 6 + [1, 1]
    assert held[32] == 0


def test_what_begins_after_a_survey_counts_at_once() -> None:
    places = ConcurrencyLimiter(100, 32)
    places.survey()
    for _ in range(200):
        webhook_id = uuid4()
        while places.free(webhook_id, 0):
            places.begin(webhook_id)
    assert sum(places.open(webhook_id) for webhook_id in places._busy) == 50


def test_those_that_failed_last_leave_a_quarter_to_newcomers() -> None:
    places = ConcurrencyLimiter(100, 32)
    dead = [uuid4() for _ in range(100)]
    for webhook_id in dead:
        places.begin(webhook_id)
        places.end(webhook_id, works=False)
    assert sum(fill(places, webhook_id) for webhook_id in dead) == 25
    assert fill(places, ONE) == 1
    assert free(places, dead[-1]) == 0


def test_a_proven_config_has_room_beside_them_and_is_held_up_by_none() -> None:
    places = ConcurrencyLimiter(100, 32)
    prove(places, ONE)
    for _ in range(200):
        fill(places, uuid4())
    assert fill(places, ONE) == 32


def test_a_config_that_falls_silent_counts_among_them_after_two_seconds() -> None:
    clock = Clock()
    places = ConcurrencyLimiter(64, 32, clock)
    prove(places, ONE)
    prove(places, OTHER)
    places.begin(ONE)
    clock.now += 1.9
    assert free(places, ONE) == 31
    clock.now += 0.2
    assert free(places, ONE) == FEW - 1
    assert free(places, OTHER) == 32
    # It answers after all: slow, but not silent.
    places.end(ONE, works=True)
    assert free(places, ONE) == 32


def test_proven_configs_that_hang_all_at_once_leave_the_last_eighth_to_those_with_few() -> None:
    clock = Clock()
    places = ConcurrencyLimiter(64, 32, clock)
    hanging = [uuid4() for _ in range(8)]
    for webhook_id in (*hanging, ONE):
        prove(places, webhook_id)
    held = [fill(places, webhook_id) for webhook_id in hanging[:3]]
    assert held == [32, 24, FEW]
    assert fill(places, ONE) == FEW
    end_all(places, ONE, works=True)
    clock.now += 3
    assert [fill(places, webhook_id) for webhook_id in hanging[3:]] == [FEW] * 5
    assert free(places, hanging[0]) == 0


def test_a_refill_is_worth_it_when_half_of_the_places_are_free() -> None:
    places = ConcurrencyLimiter(500, 8)
    prove(places, ONE)
    wanted = []
    for _ in range(8):
        places.begin(ONE)
        places.survey()
        wanted.append(places.wanted(ONE, 0))
    assert wanted == [8, 8, 8, 8, 0, 0, 0, 0]
    assert places.wanted(OTHER, 0) == FEW
    for _ in range(1000):
        fill(places, uuid4())
    places.survey()
    assert places.wanted(uuid4(), 0) == 0


def test_a_half_open_config_has_one_place_and_grows_from_there() -> None:
    places = ConcurrencyLimiter(500, 32)
    prove(places, ONE)
    places.restart(ONE)
    opened = []
    for _ in range(4):
        opened.append(fill(places, ONE))
        end_all(places, ONE, works=True)
    assert opened == [1, 2, 4, 8]


def test_who_fails_again_and_again_rests_longer_each_time_up_to_half_a_second() -> None:
    clock = Clock()
    places = ConcurrencyLimiter(500, 32, clock)
    rests = []
    for _ in range(8):
        places.begin(ONE)
        rests.append(places.end(ONE, works=False))
        clock.now += 0.9 * rests[-1]
        assert (free(places, ONE) == 0) is (rests[-1] > 0)
        clock.now += 0.2 * rests[-1]
        assert free(places, ONE) > 0
    assert rests == [0, 0, 0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    assert free(places, OTHER) == FEW


def test_an_answer_or_a_probe_ends_the_rest_and_what_says_nothing_does_not() -> None:
    clock = Clock()
    places = ConcurrencyLimiter(500, 32, clock)

    def fail_thrice() -> None:
        for _ in range(4):
            places.begin(ONE)
        for _ in range(3):
            places.end(ONE, works=False)
        assert free(places, ONE) == 0

    fail_thrice()
    assert places.end(ONE, works=None) == 0
    assert free(places, ONE) == 0
    places.restart(ONE)
    assert free(places, ONE) == 1
    fail_thrice()
    assert places.end(ONE, works=True) == 0
    assert free(places, ONE) > 0
    places.begin(ONE)
    # It begins to count anew.
    assert places.end(ONE, works=False) == 0


def test_what_is_remembered_is_bounded_and_open_attempts_stay_counted() -> None:
    places = ConcurrencyLimiter(500, 32)
    prove(places, ONE)
    places.begin(ONE)
    for _ in range(60_000):
        webhook_id = uuid4()
        places.begin(webhook_id)
        places.end(webhook_id, works=True)
    assert len(places._standings) <= 50_001
    assert places.open(ONE) == 1
    places.end(ONE, works=True)
    assert places.open(ONE) == 0
