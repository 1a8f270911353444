"""Bearer tokens: cached until they expire, and refreshed ahead of time by one fetch at a time."""

import asyncio
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from postrider_client.errors import TokenUnavailable

#: Pause after a failed refresh, while the old token is still valid.
_REFRESH_RETRY_SECONDS = 1.0
_SENDABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT and its expiry in Unix seconds. Without an expiry it is never refreshed."""

    value: str = field(repr=False)
    expires_at: float = math.inf


class TokenSource(Protocol):
    """Fetches a new token, for example from your identity provider."""

    async def __call__(self) -> Token: ...


class TokenCache:
    """The current token. Callers share one fetch and never wait for a refresh ahead of time."""

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
        self._fetching: asyncio.Task[Token] | None = None
        self._next_refresh = -math.inf

    async def get(self) -> str:
        """Return a valid token. Raises TokenUnavailable."""
        now = self._clock()
        if self._token is None or now >= self._token.expires_at:
            return (await self._fetch_now()).value
        if now >= self._token.expires_at - self._ahead and now >= self._next_refresh:
            self._start_fetch()
        return self._token.value

    async def close(self) -> None:
        """Cancel a running fetch."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    async def _fetch_now(self) -> Token:
        try:
            # A cancelled caller must not cancel the fetch of the others.
            return await asyncio.shield(self._start_fetch())
        except Exception as error:
            raise TokenUnavailable(f"the token source failed: {error!r}") from error

    def _start_fetch(self) -> asyncio.Task[Token]:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
            self._fetching.add_done_callback(self._fetch_done)
        return self._fetching

    async def _fetch(self) -> Token:
        token = await self._source()
        # gRPC hangs, even beyond the deadline, on a header that it cannot send.
        if not _SENDABLE.fullmatch(token.value):
            raise ValueError(
                "the token source returned a token that is empty or has white space, such as the "
                "newline at the end of a file, or characters that are not ASCII"
            )
        if token.expires_at <= self._clock():
            raise ValueError("the token source returned a token that has expired")
        return token

    def _fetch_done(self, fetch: asyncio.Task[Token]) -> None:
        self._fetching = None
        if fetch.cancelled():
            return
        # Reads the exception, because asyncio warns about one that is never read.
        if fetch.exception() is None:
            self._token = fetch.result()
        else:
            self._next_refresh = self._clock() + _REFRESH_RETRY_SECONDS
