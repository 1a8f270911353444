"""The HTTP client of deliveries and pings: one `post()` over a guarded connection pool.

Open one client per process. The other modules of this package are its parts: `connector` pools and
guards, `connection` speaks HTTP/1.1, `resolver` looks names up, `proxy` tunnels.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from core.addresses import AddressPolicy
from core.file_secrets import Secret
from delivery.http.connection import IdleConnections, ReceiverConnection
from delivery.http.connector import GuardedConnector, RequestTrace, note_tls_start
from delivery.http.proxy import EgressProxy
from delivery.http.resolver import GuardedResolver, Names, NameServers
from delivery.http.tls import client_tls_context
from delivery.http.tls_sessions import resume_sessions


@dataclass(slots=True)
class Response:
    """The head of a response, and its body as it arrives. Call release() in every case."""

    head: RawResponseMessage
    body: StreamReader
    _connection: Connection

    def release(self) -> None:
        """Return the connection to the pool, or abort it before the end of the body."""
        if not self.body.is_eof():
            _abort(self._connection)
            return
        cast(ReceiverConnection, self._connection.protocol).became_idle()
        self._connection.release()


class WebhookClient:
    """Sends requests to receivers. An async context manager."""

    def __init__(self, connector: GuardedConnector):
        self._connector = connector

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._connector.close()

    async def post(self, trace: RequestTrace, head: bytes, payload: bytes) -> Response:
        """Send one request and return its response. The caller sets the deadline.

        A pooled connection that turns out to be closed is replaced once, because that says nothing
        about the receiver. If a new connection ends without a response, the receiver may have
        processed the request, so a repetition is left to the next attempt. Raises AddressRefused,
        ProxyError, and the errors of aiohttp that `outcome_of_error` classifies.
        """
        try:
            return await self._post_once(trace, head, payload)
        except aiohttp.ClientConnectorError:
            raise
        except aiohttp.ClientConnectionError:
            if trace.opened:
                raise
        return await self._post_once(trace, head, payload, new=True)

    async def _post_once(
        self, trace: RequestTrace, head: bytes, payload: bytes, *, new: bool = False
    ) -> Response:
        connection = await self._connector.open(trace, new=new)
        protocol = cast(ReceiverConnection, connection.protocol)
        try:
            return Response(*await protocol.post(head, payload), connection)
        except BaseException:
            _abort(connection)
            raise


def open_client(
    *,
    policy: AddressPolicy,
    ca_file: Path | None,
    idle_seconds: float = 15.0,
    idle_max: int = 100,
    age_seconds_max: float = 300.0,
    proxy: Secret | None = None,
    names: Names | None = None,
) -> WebhookClient:
    """Open the client of a process.

    A pooled connection is not checked again, so `idle_seconds` and `age_seconds_max` limit how long
    it may outlive a change of DNS. `idle_max` limits the open files of idle connections. `names`
    replaces the system's name servers. Raises ConfigurationError if no CA is trusted, or if `proxy`
    is not http://host:port.
    """
    egress_proxy = EgressProxy(proxy) if proxy is not None and proxy.given else None
    tls = client_tls_context(ca_file)
    resume_sessions(tls, note_tls_start)
    connector = GuardedConnector(
        GuardedResolver(policy, names or NameServers()),
        policy,
        age_seconds_max,
        egress_proxy,
        idle_connections=IdleConnections(idle_max),
        ssl=tls,
        keepalive_timeout=idle_seconds,
    )
    return WebhookClient(connector)


def _abort(connection: Connection) -> None:
    """Close at once. An orderly close would wait for a receiver that does not read."""
    if connection.protocol is not None:
        connection.protocol.abort()
    connection.close()
