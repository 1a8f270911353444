"""Fetches the issuer's key set, for the server, which has no HTTP of its own."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

KEY_SET_BYTES_MAX = 512 * 1024


@asynccontextmanager
async def key_set_fetch() -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
    """Gets a document from a URL of the operator's.

    Raises aiohttp.ClientError for every answer but a 200, redirects among them, and ValueError for
    one of more than `KEY_SET_BYTES_MAX` bytes, unpacked. Who calls it bounds the time.
    """
    # Not the guarded dialler: an issuer is where the operator says, often on a private address.
    session = aiohttp.ClientSession(  # nosemgrep: unguarded-session
        trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    )

    async def fetch(url: str) -> bytes:
        # A redirect is an answer without keys: it would lead away from the URL that was set.
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
