"""Bearer tokens: asked for once at a time, ahead of their expiry, and kept while they are good."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from postrider_client.errors import TokenUnavailable

#: After a failure the source is left alone for this long while the old token is still good.
_RETRY_SECONDS = 1.0
_SENDABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT and when it ends, in Unix seconds; one without an end is never refreshed."""

    value: str = field(repr=False)
    expires_at: float = math.inf


class TokenSource(Protocol):
    """Fetches a fresh token, for example from your identity provider."""

    async def __call__(self) -> Token: ...


class TokenCache:
    """The present token. Any number of callers wait for one flight; none waits for a refresh."""

    def __init__(
        self,
        source: TokenSource,
        *,
        refresh_ahead_seconds: float = 60.0,
        clock: Callable[[], float] = time.time,
    ):
        self._source = source
        self._ahead = refresh_ahead_seconds
        self._clock = clock
        self._token: Token | None = None
        self._flight: asyncio.Task[Token] | None = None
        self._next_refresh = -math.inf

    async def get(self) -> str:
        """A token that is good now; TokenUnavailable when there is none to be had."""
        now = self._clock()
        if self._token is None or now >= self._token.expires_at:
            return (await self._fetched()).value
        if now >= self._token.expires_at - self._ahead and now >= self._next_refresh:
            self._take_off()
        return self._token.value

    async def close(self) -> None:
        """Give up a flight that is under way."""
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait({self._flight})

    async def _fetched(self) -> Token:
        try:
            # Shielded: a caller who gives up must not take the token from the others.
            return await asyncio.shield(self._take_off())
        except Exception as error:
            raise TokenUnavailable(f"the token source failed: {error!r}") from error

    def _take_off(self) -> asyncio.Task[Token]:
        if self._flight is None:
            self._flight = asyncio.create_task(self._fetch())
            self._flight.add_done_callback(self._landed)
        return self._flight

    async def _fetch(self) -> Token:
        token = await self._source()
        # gRPC never ends a call whose header it cannot send, not even at its deadline.
        if not _SENDABLE.fullmatch(token.value):
            raise ValueError(
                "the token source returned a token that is empty or has white space, such as the "
                "newline at the end of a file, or characters that no token has"
            )
        if token.expires_at <= self._clock():
            raise ValueError("the token source returned a token that has expired")
        return token

    def _landed(self, flight: asyncio.Task[Token]) -> None:
        self._flight = None
        if flight.cancelled():
            return
        # Asked for here, or asyncio complains of a refresh that failed and nobody waited for.
        if flight.exception() is None:
            self._token = flight.result()
        else:
            self._next_refresh = self._clock() + _RETRY_SECONDS
