"""Sends a webhook on to an application under development, as it came."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from cli.receiver import MAX_BODY_BYTES

_SECONDS = 30
#: Headers of one connection, and what is computed anew.
_OURS = frozenset(
    {"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_BACK = ("Content-Type", "Retry-After")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What the application answered; 502 and the reason when it did not."""

    response: web.Response
    reason: str = ""


type Forward = Callable[[web.Request, bytes], Awaitable[Forwarded]]


@asynccontextmanager
async def forwarding(url: str) -> AsyncIterator[Forward]:
    """Sends requests to `url`, whatever path they came to; neither proxies nor redirects."""

    async def forward(request: web.Request, body: bytes) -> Forwarded:
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in _OURS]
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

    # Not the guarded dialler: it goes where the developer who started this says.
    async with aiohttp.ClientSession(  # nosemgrep: unguarded-session
        timeout=aiohttp.ClientTimeout(total=_SECONDS),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        trust_env=False,
    ) as session:
        yield forward
