"""Tokens: one flight for everybody, fetched ahead of expiry, kept while the source is away."""

import asyncio

import pytest

from postrider_client import Token, TokenUnavailable
from postrider_client.tokens import TokenCache


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """Tokens of 100 s, numbered; `gate` holds a flight, `error` fails it."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.count = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = asyncio.Event()

    async def __call__(self) -> Token:
        self.count += 1
        number = self.count
        self.begun.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Token(f"t-{number}", self.clock.now + 100)


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def source(clock: Clock) -> Source:
    return Source(clock)


@pytest.fixture
async def cache(source: Source, clock: Clock) -> TokenCache:
    return TokenCache(source, refresh_ahead_seconds=30, clock=clock)


async def landed(source: Source, cache: TokenCache) -> None:
    """Until the flight in the background is over."""
    async with asyncio.timeout(5):
        while cache._flight is not None:
            await asyncio.wait({cache._flight})


async def test_callers_at_the_same_time_share_one_flight(cache: TokenCache, source: Source) -> None:
    source.gate.clear()
    waiting = [asyncio.create_task(cache.get()) for _ in range(20)]
    await source.begun.wait()
    source.gate.set()
    assert set(await asyncio.gather(*waiting)) == {"t-1"}
    assert source.count == 1


async def test_a_caller_who_gives_up_does_not_take_the_token_from_the_others(
    cache: TokenCache, source: Source
) -> None:
    source.gate.clear()
    first, second = asyncio.create_task(cache.get()), asyncio.create_task(cache.get())
    await source.begun.wait()
    first.cancel()
    await asyncio.wait({first})
    source.gate.set()
    assert await second == "t-1"
    assert source.count == 1


async def test_it_is_refreshed_ahead_of_its_end_while_callers_go_on(
    cache: TokenCache, source: Source, clock: Clock
) -> None:
    assert await cache.get() == "t-1"
    clock.now += 69
    assert await cache.get() == "t-1"
    assert source.count == 1
    clock.now += 2
    source.gate.clear()
    assert [await cache.get() for _ in range(3)] == ["t-1"] * 3
    source.gate.set()
    await landed(source, cache)
    assert await cache.get() == "t-2"
    assert source.count == 2


async def test_a_source_that_is_away_is_forgiven_while_the_old_token_is_good(
    cache: TokenCache, source: Source, clock: Clock
) -> None:
    await cache.get()
    clock.now += 80
    source.error = OSError("away")
    assert await cache.get() == "t-1"
    await landed(source, cache)
    assert [await cache.get() for _ in range(5)] == ["t-1"] * 5
    assert source.count == 2, "it must be left alone for a moment"
    clock.now += 2
    source.error = None
    await cache.get()
    await landed(source, cache)
    assert await cache.get() == "t-3"


async def test_an_expired_token_is_never_returned(
    cache: TokenCache, source: Source, clock: Clock
) -> None:
    await cache.get()
    clock.now += 100
    source.error = OSError("away")
    with pytest.raises(TokenUnavailable, match="away"):
        await cache.get()
    source.error = None
    assert await cache.get() == "t-3"


def test_a_token_does_not_show_itself() -> None:
    assert "secret-jwt" not in repr(Token("secret-jwt"))


@pytest.mark.parametrize("value", ["", "ey.ey.s\n", "ey.ey.s ", "ey.ey\x00s", "ey.é.s"])
async def test_what_no_header_can_carry_is_refused_by_name(value: str, clock: Clock) -> None:
    async def source() -> Token:
        return Token(value)

    with pytest.raises(TokenUnavailable, match="white space"):
        await TokenCache(source, clock=clock).get()
