"""Forwards webhooks unchanged to an application under development."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from cli.receiver import MAX_BODY_BYTES

_SECONDS = 30
#: Headers of one connection, and headers that are computed again.
_NOT_FORWARDED = frozenset(
    {"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_BACK = ("Content-Type", "Retry-After")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """The application's response, or 502 and the reason without one."""

    response: web.Response
    reason: str = ""


type Forward = Callable[[web.Request, bytes], Awaitable[Forwarded]]


@asynccontextmanager
async def forwarding(url: str) -> AsyncIterator[Forward]:
    """Yield a function that sends requests to `url`, for every path. It follows no redirects."""

    async def forward(request: web.Request, body: bytes) -> Forwarded:
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in _NOT_FORWARDED]
        try:
            async with session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                answered = await answer.content.read(MAX_BODY_BYTES)
                back = {name: answer.headers[name] for name in _BACK if name in answer.headers}
                return Forwarded(web.Response(status=answer.status, body=answered, headers=back))
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = str(error) or f"no answer within {_SECONDS} s"
            return Forwarded(web.Response(status=502, text=reason), reason)

    # Not the guarded client, because the developer chose the URL.
    async with aiohttp.ClientSession(  # nosemgrep: unguarded-session
        timeout=aiohttp.ClientTimeout(total=_SECONDS),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        trust_env=False,
    ) as session:
        yield forward
