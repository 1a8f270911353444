"""How much one caller may ask of this server process: calls in a time, pings and streams at once.

A token that names a merchant counts for the merchant, whoever holds it; any other caller counts for
itself. What is kept is in memory and bounded, and holds for one process: n servers let n times as
much through.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from core.errors import QuotaExceeded
from server.auth.principal import Principal
from server.settings import ServerSettings

#: Calls that make us dial an address of the caller's choice.
DIALLING = frozenset(
    f"/postrider.v1.WebhookConfigService/{name}WebhookConfig"
    for name in ("Create", "Update", "Ping")
)
MAX_REMEMBERED_CALLERS = 10_000


class Rate:
    """Token buckets by key, each of `burst` and refilled at `per_second`; 0 is no limit.

    A bucket is one number, the time at which it is full again (GCRA). One that is full is as good
    as none, so forgetting the key that has not been used for longest forgives next to nothing.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = monotonic):
        self._interval = 1 / per_second if per_second else 0.0
        self._depth = self._interval * burst
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def spend(self, key: str) -> float:
        """Take one; 0 when it was there, else the seconds until it will be, and nothing taken."""
        if not self._interval:
            return 0.0
        now = self._clock()
        # Taken out and put back, so that the first key is the one unused for longest.
        full_at = max(self._full_at.pop(key, now), now)
        after = full_at + self._interval
        # A fraction of a call too many is rounding.
        wait = after - now - self._depth
        if wait <= self._interval * 1e-6:
            full_at, wait = after, 0.0
        self._full_at[key] = full_at
        if len(self._full_at) > MAX_REMEMBERED_CALLERS:
            del self._full_at[next(iter(self._full_at))]
        return wait


class CallerLimits:
    """Lets a known caller's call in, or refuses it before its request is read."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = monotonic):
        self._merchants = Rate(settings.merchant_call_rate, settings.merchant_call_burst, clock)
        self._services = Rate(settings.service_call_rate, settings.service_call_burst, clock)
        self._dialling = Rate(settings.registration_rate, settings.registration_burst, clock)

    def admit(self, caller: Principal, method: str) -> None:
        """QuotaExceeded when it is one call too many; `method` is `/package.Service/Method`."""
        merchant_id = caller.merchant_id
        if merchant_id is None:
            wait = self._services.spend(caller.subject)
        else:
            wait = self._merchants.spend(merchant_id)
        if wait:
            raise QuotaExceeded(
                f"too many calls: wait {wait:.3f} s, then send fewer, or more events in each",
                reason="CALL_RATE_LIMIT",
                subject=_subject(caller),
                retry_after_seconds=wait,
            )
        if method in DIALLING:
            wait = self._dialling.spend(_subject(caller))
            if wait:
                raise QuotaExceeded(
                    f"too many webhook configs created, updated or pinged: wait {wait:.3f} s",
                    reason="REGISTRATION_RATE_LIMIT",
                    subject=_subject(caller),
                    retry_after_seconds=wait,
                )


class ConcurrencyLimiter(ABC):
    """How many of one kind one merchant may have under way at once."""

    def __init__(self, most: int):
        self._most = most
        self._taken: Counter[str] = Counter()

    @contextmanager
    def place(self, merchant_id: str) -> Iterator[None]:
        """Holds a place; QuotaExceeded when all are taken."""
        if self._taken[merchant_id] >= self._most:
            raise self._refusal(merchant_id)
        self._taken[merchant_id] += 1
        try:
            yield
        finally:
            self._taken[merchant_id] -= 1
            if not self._taken[merchant_id]:
                del self._taken[merchant_id]

    @abstractmethod
    def _refusal(self, merchant_id: str) -> QuotaExceeded: ...


class PingSlots(ConcurrencyLimiter):
    """Of receivers that one merchant has us wait for."""

    def _refusal(self, merchant_id: str) -> QuotaExceeded:
        return QuotaExceeded(
            f"{self._most} pings of this merchant are under way, as many as there may be: wait "
            "for one to end",
            reason="PINGS_LIMIT",
            subject=f"merchant:{merchant_id}",
            retry_after_seconds=1.0,
        )


class StreamSlots(ConcurrencyLimiter):
    """Of calls that last as long as their caller likes, each of which is one that others lack."""

    def _refusal(self, merchant_id: str) -> QuotaExceeded:
        # Nobody knows when one ends, so no time to come back.
        return QuotaExceeded(
            f"{self._most} watches and streams of this merchant are open, as many as there may be: "
            "end one first; a watch without filters tells of everything",
            reason="STREAMS_LIMIT",
            subject=f"merchant:{merchant_id}",
        )


def _subject(caller: Principal) -> str:
    if caller.merchant_id is not None:
        return f"merchant:{caller.merchant_id}"
    return f"caller:{caller.subject}"
