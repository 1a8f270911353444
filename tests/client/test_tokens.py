"""The token cache: shared fetches, refresh ahead of expiry, failures of the source."""

import asyncio

import pytest

from postrider_client import Token, TokenUnavailable
from postrider_client.tokens import TokenCache
from tests.support.clock import ManualClock


class Source:
    """Numbered tokens that expire after 100 s. `gate` delays a fetch, `error` makes it fail."""

    def __init__(self, clock: ManualClock):
        self.clock = clock
        self.count = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()

    async def __call__(self) -> Token:
        self.count += 1
        number = self.count
        self.started.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Token(f"t-{number}", self.clock.now + 100)


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def source(clock: ManualClock) -> Source:
    return Source(clock)


@pytest.fixture
async def cache(source: Source, clock: ManualClock) -> TokenCache:
    return TokenCache(source, refresh_ahead_seconds=30, clock=clock)


async def fetched(source: Source, cache: TokenCache) -> None:
    """Wait until no fetch is running."""
    async with asyncio.timeout(5):
        while cache._fetching is not None:
            await asyncio.wait({cache._fetching})


async def test_concurrent_callers_share_one_fetch(cache: TokenCache, source: Source) -> None:
    source.gate.clear()
    waiting = [asyncio.create_task(cache.get()) for _ in range(20)]
    await source.started.wait()
    source.gate.set()
    assert set(await asyncio.gather(*waiting)) == {"t-1"}
    assert source.count == 1


async def test_cancelled_caller_does_not_cancel_the_fetch(
    cache: TokenCache, source: Source
) -> None:
    source.gate.clear()
    first, second = asyncio.create_task(cache.get()), asyncio.create_task(cache.get())
    await source.started.wait()
    first.cancel()
    await asyncio.wait({first})
    source.gate.set()
    assert await second == "t-1"
    assert source.count == 1


async def test_token_is_refreshed_in_background_before_expiry(
    cache: TokenCache, source: Source, clock: ManualClock
) -> None:
    assert await cache.get() == "t-1"
    clock.now += 69
    assert await cache.get() == "t-1"
    assert source.count == 1
    clock.now += 2
    source.gate.clear()
    assert [await cache.get() for _ in range(3)] == ["t-1"] * 3
    source.gate.set()
    await fetched(source, cache)
    assert await cache.get() == "t-2"
    assert source.count == 2


async def test_failed_refresh_keeps_the_valid_token(
    cache: TokenCache, source: Source, clock: ManualClock
) -> None:
    await cache.get()
    clock.now += 80
    source.error = OSError("away")
    assert await cache.get() == "t-1"
    await fetched(source, cache)
    assert [await cache.get() for _ in range(5)] == ["t-1"] * 5
    assert source.count == 2, "retried only after a pause"
    clock.now += 2
    source.error = None
    await cache.get()
    await fetched(source, cache)
    assert await cache.get() == "t-3"


async def test_expired_token_is_never_returned(
    cache: TokenCache, source: Source, clock: ManualClock
) -> None:
    await cache.get()
    clock.now += 100
    source.error = OSError("away")
    with pytest.raises(TokenUnavailable, match="away"):
        await cache.get()
    source.error = None
    assert await cache.get() == "t-3"


def test_repr_hides_the_token() -> None:
    assert "secret-jwt" not in repr(Token("secret-jwt"))


@pytest.mark.parametrize("value", ["", "ey.ey.s\n", "ey.ey.s ", "ey.ey\x00s", "ey.é.s"])
async def test_token_with_invalid_characters_is_refused(value: str, clock: ManualClock) -> None:
    async def source() -> Token:
        return Token(value)

    with pytest.raises(TokenUnavailable, match="white space"):
        await TokenCache(source, clock=clock).get()
