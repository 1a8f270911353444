"""An HTTP listener for webhooks: what the demo, `postrider listen` and `postrider canary` share."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from core.errors import ConfigurationError

#: Of a request's body; four times what Postrider sends at the most by default.
MAX_BODY_BYTES = 2**20

type Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def accepting(
    handle: Handle, host: str, port: int, tls: ssl.SSLContext | None, mend: str
) -> AsyncIterator[int]:
    """Have `handle` answer every request, in plain HTTP without `tls`; the port (0: a free one).

    Reading a body above MAX_BODY_BYTES raises aiohttp's HTTPRequestEntityTooLarge. `mend` says
    what to do when the port cannot be had, which raises ConfigurationError.
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
            raise ConfigurationError(f"cannot listen on {host}:{port} ({reason}): {mend}") from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
