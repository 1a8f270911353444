"""An HTTP listener for webhooks, for the demo, `postrider listen` and `postrider canary`."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from core.errors import ConfigurationError

#: Limit of a request's body. It is four times the default payload limit.
MAX_BODY_BYTES = 2**20

type Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def accepting(
    handle: Handle, host: str, port: int, tls: ssl.SSLContext | None, advice: str
) -> AsyncIterator[int]:
    """Listen, let `handle` answer every request, and yield the port. Port 0 selects a free one.

    Without `tls` it speaks plain HTTP. Reading a body above MAX_BODY_BYTES raises aiohttp's
    HTTPRequestEntityTooLarge. If the port is not available, it raises ConfigurationError with
    `advice`.
    """
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({reason}): {advice}"
            ) from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
