"""Figures of single merchants: of those with the most deliveries lately, and of the rest together.

There may be a hundred thousand merchants, and each of theirs would be a time series for ever.
"""

from collections.abc import Callable, Mapping
from time import monotonic

from core.lifecycle import DeliveryState

#: How often it is decided anew who is shown.
_TERM_SECONDS = 60.0
#: Merchants that are told apart in a term; in one with more, those that come later wait.
_CANDIDATES_MAX = 10_000

#: Stands for all merchants that are not shown.
OTHER = "other"

type Tally = dict[DeliveryState, int]


class BusiestMerchants:
    """Counts the finished deliveries of at most `shown` merchants by name.

    Each delivery counts once: for its merchant while that one is shown, else for the rest. A series
    never falls; it begins at 0 and is gone when others have had more for long enough.
    """

    def __init__(self, shown: int, clock: Callable[[], float] = monotonic):
        self._shown = shown
        self._clock = clock
        self._term_ends_at = clock() + _TERM_SECONDS
        self._tallies: dict[str, Tally] = {}
        self._others = _zero()
        # Deliveries in this term, of whomever; and of those shown what is left of terms before.
        self._recent: dict[str, int] = {}
        self._standing: dict[str, float] = {}

    def count(self, merchant_id: str, state: DeliveryState) -> None:
        recent = self._recent
        if merchant_id in recent or len(recent) < _CANDIDATES_MAX:
            recent[merchant_id] = recent.get(merchant_id, 0) + 1
        tally = self._tallies.get(merchant_id)
        if tally is None:
            if len(self._tallies) < self._shown:
                tally = self._tallies[merchant_id] = _zero()
            else:
                tally = self._others
        tally[state] += 1

    def tallies(self) -> Mapping[str, Tally]:
        """By merchant, at most as many as are shown, and `other`; whoever reads it ends a term."""
        if self._clock() >= self._term_ends_at:
            self._choose()
        return {**self._tallies, OTHER: self._others}

    def _choose(self) -> None:
        self._term_ends_at = self._clock() + _TERM_SECONDS
        # A term ago counts half: who is quiet for a moment is not gone at once.
        standing = {merchant: self._standing.get(merchant, 0.0) / 2 for merchant in self._tallies}
        for merchant, count in self._recent.items():
            standing[merchant] = standing.get(merchant, 0.0) + count
        best = sorted(standing, key=lambda merchant: (-standing[merchant], merchant))[: self._shown]
        self._standing = {merchant: standing[merchant] for merchant in best}
        self._tallies = {merchant: self._tallies.get(merchant) or _zero() for merchant in best}
        self._recent = {}


def _zero() -> Tally:
    return {DeliveryState.DELIVERED: 0, DeliveryState.FAILED: 0}
