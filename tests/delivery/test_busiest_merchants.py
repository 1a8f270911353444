"""Series of merchants: few, of those that matter, and no delivery counted twice or not at all."""

from collections import Counter

from core.lifecycle import DeliveryState
from delivery.metrics import OTHER, BusiestMerchants

DELIVERED, FAILED = DeliveryState.DELIVERED, DeliveryState.FAILED
TERM = 60.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def delivered(merchants: BusiestMerchants) -> dict[str, int]:
    return {merchant: tally[DELIVERED] for merchant, tally in merchants.tallies().items()}


def test_while_there_are_few_each_has_its_own() -> None:
    merchants = BusiestMerchants(2, Clock())

    merchants.count("m_1", DELIVERED)
    merchants.count("m_1", FAILED)
    merchants.count("m_2", DELIVERED)

    assert merchants.tallies()["m_1"] == {DELIVERED: 1, FAILED: 1}
    assert delivered(merchants) == {"m_1": 1, "m_2": 1, OTHER: 0}


def test_a_hundred_thousand_merchants_are_a_few_series_and_bounded_memory() -> None:
    clock = Clock()
    merchants = BusiestMerchants(20, clock)

    for term in range(2):
        for number in range(50_000):
            merchants.count(f"m_{term}_{number}", DELIVERED)
        assert len(merchants._recent) <= 10_000
        assert len(merchants.tallies()) == 21
        clock.now += TERM
        assert len(merchants.tallies()) == 21
        assert len(merchants._standing) <= 20


def test_who_has_more_lately_is_shown_from_zero_on() -> None:
    clock = Clock()
    merchants = BusiestMerchants(1, clock)
    merchants.count("m_early", DELIVERED)
    for _ in range(5):
        merchants.count("m_busy", DELIVERED)
    assert delivered(merchants) == {"m_early": 1, OTHER: 5}

    clock.now += TERM
    assert delivered(merchants) == {"m_busy": 0, OTHER: 5}
    merchants.count("m_busy", DELIVERED)
    merchants.count("m_early", DELIVERED)

    assert delivered(merchants) == {"m_busy": 1, OTHER: 6}


def test_who_is_quiet_for_a_moment_stays() -> None:
    clock = Clock()
    merchants = BusiestMerchants(1, clock)
    for _ in range(100):
        merchants.count("m_busy", DELIVERED)
    for _ in range(4):
        clock.now += TERM
        merchants.count("m_small", DELIVERED)
        assert "m_busy" in merchants.tallies()

    for _ in range(8):
        clock.now += TERM
        merchants.count("m_small", DELIVERED)
        merchants.tallies()
    assert "m_busy" not in merchants.tallies()


def test_each_delivery_counts_once_and_no_series_falls() -> None:
    clock = Clock()
    merchants = BusiestMerchants(3, clock)
    before = Counter[str]()
    risen = total = 0
    for term in range(20):
        for number in range(50):
            for _ in range(number * term % 7):
                merchants.count(f"m_{number}", DELIVERED)
                total += 1
        now = Counter(delivered(merchants))
        # What a scrape just before the new term sees of it.
        risen += sum(now[merchant] - before[merchant] for merchant in now)
        clock.now += TERM
        before = Counter(delivered(merchants))
        assert all(before[merchant] in (now[merchant], 0) for merchant in before)
    assert risen == total


def test_without_any_shown_all_are_the_others() -> None:
    merchants = BusiestMerchants(0, Clock())
    merchants.count("m_1", FAILED)

    assert merchants.tallies() == {OTHER: {DELIVERED: 0, FAILED: 1}}
