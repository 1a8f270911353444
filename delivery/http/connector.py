"""A connection pool that refuses forbidden addresses, built on aiohttp's TCPConnector.

The guard checks all addresses of a name, and each address again when its socket is created, also
one that is written in the URL. Behind an operator's proxy (delivery/http/proxy.py) the proxy
resolves names, so only literal addresses are checked here.
"""

import re
import socket
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import Any, ClassVar, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from yarl import URL

from core.addresses import AddressPolicy
from delivery.http.connection import IdleConnections, ReceiverConnection
from delivery.http.guard import AddressRefused, refusal_of, refuse_unless_allowed
from delivery.http.proxy import EgressProxy, ProxyError, proxy_unreachable
from delivery.http.request import RequestTemplate

#: The sender sets one deadline for all phases.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
#: A text that some parser reads as an address: IPv6, or a name that ends in a number.
_LITERAL = re.compile(r".*:.*|(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)


@dataclass(slots=True)
class RequestTrace:
    """The phases of one request. `opened` is False if it used a pooled connection.

    aiohttp's connector receives it instead of an aiohttp request.
    """

    request_template: RequestTemplate
    opened: bool = False
    refusals: list[AddressRefused] = field(default_factory=list)
    #: Durations of the look-up, of TCP with TLS, and of TLS. None for a phase that did not start.
    dns_us: int | None = None
    connect_us: int | None = None
    tls_us: int | None = None
    #: perf_counter() when TLS started with the last address.
    tls_started_at: float | None = None
    #: perf_counter() when the connection was ready.
    connected_at: float | None = None
    #: The connected address. Never a refused one, and None behind a proxy.
    remote_address: str | None = None
    #: Set while connecting to the proxy: the error of a timeout in that phase.
    timeout_error: ProxyError | None = None

    proxy: ClassVar[None] = None
    ssl: ClassVar[bool] = True
    server_hostname: ClassVar[None] = None

    @property
    def connection_key(self) -> ConnectionKey:
        return self.request_template.connection_key

    @property
    def url(self) -> URL:
        return self.request_template.url

    @property
    def port(self) -> int | None:
        return self.request_template.url.port

    def is_ssl(self) -> bool:
        """Return True, because receivers are called with HTTPS only."""
        return True


# The trace of the connection being made. aiohttp connects to the addresses in concurrent tasks,
# which copy the context and share the trace.
_trace: ContextVar[RequestTrace] = ContextVar("dialling")


class GuardedConnector(aiohttp.TCPConnector):
    """A pool of connections by origin that checks each address before its socket is created."""

    def __init__(
        self,
        resolver: AbstractResolver,
        policy: AddressPolicy,
        age_seconds_max: float,
        proxy: EgressProxy | None = None,
        *,
        idle_connections: IdleConnections,
        **options: Any,
    ):
        super().__init__(
            resolver=resolver,
            socket_factory=self._open_socket,
            use_dns_cache=False,
            # The engine limits open attempts. A wait for the pool would count against the timeout.
            limit=0,
            **options,
        )
        self._factory = partial(  # type: ignore[assignment]
            ReceiverConnection, loop=self._loop, idle=idle_connections
        )
        self._policy = policy
        self._age_seconds_max = age_seconds_max
        self._proxy = proxy
        self._closed_together = resolver

    async def open(self, trace: RequestTrace, *, new: bool = False) -> Connection:
        """Return a connection for one request, and note its phases in `trace`.

        `new` excludes pooled connections. Raises AddressRefused, ProxyError and the errors of
        aiohttp's connector.
        """
        while True:
            connection = await self.connect(cast(aiohttp.ClientRequest, trace), [], _NO_TIMEOUT)
            protocol = cast(ReceiverConnection, connection.protocol)
            stale = new or monotonic() - protocol.made_at > self._age_seconds_max
            if trace.opened or not stale:
                break
            connection.close()
        trace.connected_at = perf_counter()
        trace.remote_address = protocol.remote_address
        return connection

    async def __aenter__(self) -> "GuardedConnector":
        return self

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        await self._closed_together.close()

    async def _create_connection(self, *request: Any, **options: Any) -> ResponseHandler:
        """Connect, and measure the time, also of a connection that fails or is cancelled."""
        began = perf_counter()
        trace: RequestTrace = request[0]
        token = _trace.set(trace)
        try:
            if self._proxy is not None:
                return await self._create_tunnelled(trace, self._proxy)
            return await super()._create_connection(*request, **options)
        except Exception as error:
            # With several addresses, aiohappyeyeballs drops errors other than OSError and
            # RuntimeError, and raises IndexError or the error of another address instead.
            if trace.refusals and refusal_of(error) is None:
                raise trace.refusals[0] from error
            raise
        finally:
            _trace.reset(token)
            if trace.opened:
                ended = perf_counter()
                trace.connect_us = _microseconds(began, ended) - (trace.dns_us or 0)
                if trace.tls_started_at is not None:
                    trace.tls_us = _microseconds(trace.tls_started_at, ended)

    async def _create_tunnelled(self, trace: RequestTrace, proxy: EgressProxy) -> ResponseHandler:
        """Connect through the proxy, in the way that aiohttp connects to an address."""
        host = (trace.url.raw_host or "").rstrip(".")
        if _LITERAL.fullmatch(host):
            refuse_unless_allowed(self._policy, host)
        trace.opened = True
        trace.timeout_error = proxy_unreachable()
        tunnel = await proxy.reach()
        trace.timeout_error = None
        try:
            bracketed = f"[{host}]" if ":" in host else host
            await proxy.open_tunnel(tunnel, f"{bracketed}:{trace.port}")
        except BaseException:
            tunnel.close()
            raise
        _, protocol = await self._loop.create_connection(
            self._factory,
            sock=tunnel,
            ssl=self._get_ssl_context(cast(aiohttp.ClientRequest, trace)),
            server_hostname=host,
        )
        # It is the proxy's address.
        cast(ReceiverConnection, protocol).remote_address = None
        return protocol

    async def _resolve_host(self, *host: Any, **options: Any) -> list[ResolveResult]:
        began = perf_counter()
        try:
            return await super()._resolve_host(*host, **options)
        finally:
            _trace.get().dns_us = _microseconds(began, perf_counter())

    def _open_socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, sockaddr = addr_info
        trace = _trace.get()
        try:
            refuse_unless_allowed(self._policy, sockaddr[0])
        except AddressRefused as refusal:
            trace.refusals.append(refusal)
            raise
        trace.opened = True
        trace.tls_started_at = None
        trace.remote_address = str(sockaddr[0])
        return socket.socket(family, kind, protocol)


def note_tls_start() -> None:
    """Note the start of TLS. Called in the context of the connection or in a copy of it."""
    _trace.get().tls_started_at = perf_counter()


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
