"""A gRPC server with the dispatcher of production, but with the test's handlers and no database."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from core.logs import SuccessSampling
from core.settings import LogSettings
from server.metrics import ServerMetrics
from server.rpc.audit_refusals import RefusalAudit
from server.rpc.authenticate import Authentication
from server.rpc.call import current_call
from server.rpc.dispatch import Calls
from server.rpc.report import RpcReports


class _NoAudit(RefusalAudit):
    """In place of the audit log, which must not contain refusals of unknown callers."""

    def __init__(self) -> None:
        pass

    async def record(self, *_: object) -> None:
        assert current_call().caller is None


@asynccontextmanager
async def dispatching(
    authentication: Authentication,
    handlers: dict[str, Any],
    options: Sequence[tuple[str, Any]] = (),
) -> AsyncIterator[Any]:
    """Serve the methods of `test.Echo`. Yields a channel to the server."""
    server = grpc.aio.server(options=options)
    services = [grpc.method_handlers_generic_handler("test.Echo", handlers)]
    reports = RpcReports(ServerMetrics({}), SuccessSampling(LogSettings()))
    server.add_generic_rpc_handlers([Calls(services, authentication, _NoAudit(), reports)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield channel
    await server.stop(None)
