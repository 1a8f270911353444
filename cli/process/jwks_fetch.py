"""Fetches the issuer's key set for the server, which has no HTTP client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

KEY_SET_BYTES_MAX = 512 * 1024


@asynccontextmanager
async def key_set_fetch() -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
    """Yield a function that returns the document at a URL of the operator's settings.

    It raises aiohttp.ClientError for every status but 200, redirects included, and ValueError above
    `KEY_SET_BYTES_MAX` unpacked bytes. The caller sets the timeout.
    """
    # Not the guarded client, because an issuer is often at a private address.
    session = aiohttp.ClientSession(  # nosemgrep: unguarded-session
        trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    )

    async def fetch(url: str) -> bytes:
        # A redirect would lead away from the configured URL.
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise aiohttp.ClientResponseError(
                    response.request_info, response.history, status=response.status
                )
            document = bytearray()
            async for chunk in response.content.iter_any():
                document += chunk
                if len(document) > KEY_SET_BYTES_MAX:
                    raise ValueError("the key set is too large")
            return bytes(document)

    async with session:
        yield fetch
