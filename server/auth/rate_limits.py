"""Limits of one caller in this server process: calls per second, and concurrent pings and streams.

All tokens of a merchant share its limits. Other callers are counted by their subject. The counts
are in memory and bounded. They apply to one process, so n servers allow n times as much.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from core.errors import QuotaExceeded
from server.auth.principal import Principal
from server.settings import ServerSettings

#: Methods that connect to an address that the caller chooses.
CONNECTING = frozenset(
    f"/postrider.v1.WebhookConfigService/{name}WebhookConfig"
    for name in ("Create", "Update", "Ping")
)
MAX_REMEMBERED_CALLERS = 10_000


class Rate:
    """Token buckets by key, of size `burst` and refilled at `per_second`. 0 means no limit.

    A bucket is one number, the time at which it is full again (GCRA). The least recently used key
    is dropped first. Its bucket is probably full, so dropping it changes almost nothing.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = monotonic):
        self._interval = 1 / per_second if per_second else 0.0
        self._depth = self._interval * burst
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def spend(self, key: str) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        if not self._interval:
            return 0.0
        now = self._clock()
        # Removed and added again, so that the first key is the least recently used.
        full_at = max(self._full_at.pop(key, now), now)
        after = full_at + self._interval
        # A millionth of a call is a rounding error.
        wait = after - now - self._depth
        if wait <= self._interval * 1e-6:
            full_at, wait = after, 0.0
        self._full_at[key] = full_at
        if len(self._full_at) > MAX_REMEMBERED_CALLERS:
            del self._full_at[next(iter(self._full_at))]
        return wait


class CallerLimits:
    """Limits the call rate of known callers, before their requests are read."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = monotonic):
        self._merchants = Rate(settings.merchant_call_rate, settings.merchant_call_burst, clock)
        self._services = Rate(settings.service_call_rate, settings.service_call_burst, clock)
        self._connecting = Rate(settings.registration_rate, settings.registration_burst, clock)

    def admit(self, caller: Principal, method: str) -> None:
        """Raise QuotaExceeded above the limit. `method` is `/package.Service/Method`."""
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
        if method in CONNECTING:
            wait = self._connecting.spend(_subject(caller))
            if wait:
                raise QuotaExceeded(
                    f"too many webhook configs created, updated or pinged: wait {wait:.3f} s",
                    reason="REGISTRATION_RATE_LIMIT",
                    subject=_subject(caller),
                    retry_after_seconds=wait,
                )


class MerchantSlots(ABC):
    """Limits the concurrent calls of one kind per merchant."""

    def __init__(self, limit: int):
        self._limit = limit
        self._used: Counter[str] = Counter()

    @contextmanager
    def slot(self, merchant_id: str) -> Iterator[None]:
        """Hold a slot. Raises QuotaExceeded if all are taken."""
        if self._used[merchant_id] >= self._limit:
            raise self._refusal(merchant_id)
        self._used[merchant_id] += 1
        try:
            yield
        finally:
            self._used[merchant_id] -= 1
            if not self._used[merchant_id]:
                del self._used[merchant_id]

    @abstractmethod
    def _refusal(self, merchant_id: str) -> QuotaExceeded: ...


class PingSlots(MerchantSlots):
    """Limits the concurrent pings of a merchant's receivers."""

    def _refusal(self, merchant_id: str) -> QuotaExceeded:
        return QuotaExceeded(
            f"this merchant has {self._limit} pings in progress: wait until one ends",
            reason="PINGS_LIMIT",
            subject=f"merchant:{merchant_id}",
            retry_after_seconds=1.0,
        )


class StreamSlots(MerchantSlots):
    """Limits the open streams of a merchant, because each occupies a call of the server."""

    def _refusal(self, merchant_id: str) -> QuotaExceeded:
        # No retry time, because a stream may stay open for long.
        return QuotaExceeded(
            f"this merchant has {self._limit} open watches and streams: end one first; "
            "a watch without filters covers all deliveries",
            reason="STREAMS_LIMIT",
            subject=f"merchant:{merchant_id}",
        )


def _subject(caller: Principal) -> str:
    if caller.merchant_id is not None:
        return f"merchant:{caller.merchant_id}"
    return f"caller:{caller.subject}"
