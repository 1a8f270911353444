"""Everything aiohttp about dialling: pings and deliveries share the pool opened here.

No socket is opened to an address that the policy refuses, however the address was come by: a name's
answers are judged all or nothing, and every address, literals included, again as it is dialled.
Through an operator's proxy (delivery/http/proxy.py) only literals are ours to judge.
"""

import re
import socket
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, ClassVar, cast

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from yarl import URL

from core.addresses import AddressPolicy
from core.file_secrets import Secret
from delivery.http.connection import ReceiverConnection, Resting
from delivery.http.guard import AddressRefused, refusal_of, refuse_unless_allowed
from delivery.http.proxy import EgressProxy, ProxyError, proxy_away
from delivery.http.request import Destination
from delivery.http.resolver import GuardedResolver, Names, NameServers
from delivery.http.tls import trusting_context
from delivery.http.tls_sessions import resume_sessions

#: Deadlines are the sender's, over all phases at once.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)
#: What some parser takes for an address: in IPv6, or a name that ends in a number.
_LITERAL = re.compile(r".*:.*|(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)


@dataclass(slots=True)
class Dialling:
    """What dialling came to for one request; without `opened`, a pooled connection was used.

    aiohttp's connector takes it for the request that it connects for.
    """

    destination: Destination
    opened: bool = False
    refusals: list[AddressRefused] = field(default_factory=list)
    #: The look-up, TCP with TLS, and TLS alone; None for what was not begun.
    dns_us: int | None = None
    connect_us: int | None = None
    tls_us: int | None = None
    #: By perf_counter(), of the address that was dialled last.
    tls_began_at: float | None = None
    #: When there was a connection to send on, by perf_counter(); and what it leads to.
    connected_at: float | None = None
    #: Never one that was refused: that is nobody's business. Unknown behind a proxy.
    remote_address: str | None = None
    #: While the proxy is being reached: what it means to run out of time then.
    fault: ProxyError | None = None

    proxy: ClassVar[None] = None
    ssl: ClassVar[bool] = True
    server_hostname: ClassVar[None] = None

    @property
    def connection_key(self) -> ConnectionKey:
        return self.destination.connection_key

    @property
    def url(self) -> URL:
        return self.destination.url

    @property
    def port(self) -> int | None:
        return self.destination.url.port

    def is_ssl(self) -> bool:
        """Always: nothing else is ever spoken to a receiver."""
        return True


# Of the connection that is being made. Connecting races the addresses in tasks of their own, which
# copy the context and so share what it holds.
_dialling: ContextVar[Dialling] = ContextVar("dialling")


def open_dialler(
    *,
    policy: AddressPolicy,
    ca_file: Path | None,
    idle_seconds: float = 15.0,
    idle_max: int = 100,
    age_seconds_max: float = 300.0,
    proxy: Secret | None = None,
    names: Names | None = None,
) -> "Dialler":
    """Open the one dialler of a process.

    Raises ConfigurationError when no CA could be trusted, or `proxy` is not http://host:port.

    A pooled connection is not judged again, so `idle_seconds` and `age_seconds_max` bound how long
    one may outlive a change of DNS, and `idle_max` how many files all of them hold. `names` stands
    in for the system's name servers.
    """
    egress_proxy = EgressProxy(proxy) if proxy is not None and proxy.given else None
    tls = trusting_context(ca_file)
    resume_sessions(tls, _tls_begins)
    resolver = GuardedResolver(policy, names or NameServers())
    return Dialler(
        resolver,
        policy,
        age_seconds_max,
        egress_proxy,
        resting=Resting(idle_max),
        ssl=tls,
        keepalive_timeout=idle_seconds,
    )


class Dialler(aiohttp.TCPConnector):
    """A pool of connections by origin that judges each address as it is dialled."""

    def __init__(
        self,
        resolver: AbstractResolver,
        policy: AddressPolicy,
        age_seconds_max: float,
        proxy: EgressProxy | None = None,
        *,
        resting: Resting,
        **options: Any,
    ):
        super().__init__(
            resolver=resolver,
            socket_factory=self._open_socket,
            use_dns_cache=False,
            # The engine bounds what is in flight; waiting for a pool would be charged to merchants.
            limit=0,
            **options,
        )
        self._factory = partial(  # type: ignore[assignment]
            ReceiverConnection, loop=self._loop, among=resting
        )
        self._policy = policy
        self._age_seconds_max = age_seconds_max
        self._proxy = proxy
        self._closes_with_us = resolver

    async def dial(self, dialling: Dialling, *, anew: bool = False) -> Connection:
        """A connection to send one request on, and what it took in `dialling`.

        With `anew` never a pooled one. Raises AddressRefused, ProxyError, and what aiohttp's
        connector raises. The caller gives it back by release(), or by close() when an answer is
        not over.
        """
        while True:
            connection = await self.connect(cast(aiohttp.ClientRequest, dialling), [], _NO_TIMEOUT)
            protocol = cast(ReceiverConnection, connection.protocol)
            stale = anew or monotonic() - protocol.made_at > self._age_seconds_max
            if dialling.opened or not stale:
                break
            connection.close()
        dialling.connected_at = perf_counter()
        dialling.remote_address = protocol.remote_address
        return connection

    async def __aenter__(self) -> "Dialler":
        return self

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        await self._closes_with_us.close()

    async def _create_connection(self, *request: Any, **options: Any) -> ResponseHandler:
        """Take the time of a new connection, also of one that fails or is given up."""
        began = perf_counter()
        dialling: Dialling = request[0]
        token = _dialling.set(dialling)
        try:
            if self._proxy is not None:
                return await self._create_tunnelled(dialling, self._proxy)
            return await super()._create_connection(*request, **options)
        except Exception as error:
            # With several addresses aiohappyeyeballs drops what is neither OSError nor
            # RuntimeError: in its place come a bare IndexError or the error of another address.
            if dialling.refusals and refusal_of(error) is None:
                raise dialling.refusals[0] from error
            raise
        finally:
            _dialling.reset(token)
            if dialling.opened:
                ended = perf_counter()
                dialling.connect_us = _microseconds(began, ended) - (dialling.dns_us or 0)
                if dialling.tls_began_at is not None:
                    dialling.tls_us = _microseconds(dialling.tls_began_at, ended)

    async def _create_tunnelled(self, dialling: Dialling, proxy: EgressProxy) -> ResponseHandler:
        """As aiohttp makes a connection, on a socket that the proxy leads to the receiver."""
        host = (dialling.url.raw_host or "").rstrip(".")
        if _LITERAL.fullmatch(host):
            refuse_unless_allowed(self._policy, host)
        dialling.opened = True
        dialling.fault = proxy_away()
        tunnel = await proxy.reach()
        dialling.fault = None
        try:
            bracketed = f"[{host}]" if ":" in host else host
            await proxy.open_tunnel(tunnel, f"{bracketed}:{dialling.port}")
        except BaseException:
            tunnel.close()
            raise
        _, protocol = await self._loop.create_connection(
            self._factory,
            sock=tunnel,
            ssl=self._get_ssl_context(cast(aiohttp.ClientRequest, dialling)),
            server_hostname=host,
        )
        # That of the proxy.
        cast(ReceiverConnection, protocol).remote_address = None
        return protocol

    async def _resolve_host(self, *host: Any, **options: Any) -> list[ResolveResult]:
        began = perf_counter()
        try:
            return await super()._resolve_host(*host, **options)
        finally:
            _dialling.get().dns_us = _microseconds(began, perf_counter())

    def _open_socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, sockaddr = addr_info
        dialling = _dialling.get()
        try:
            refuse_unless_allowed(self._policy, sockaddr[0])
        except AddressRefused as refusal:
            dialling.refusals.append(refusal)
            raise
        dialling.opened = True
        dialling.tls_began_at = None
        dialling.remote_address = str(sockaddr[0])
        return socket.socket(family, kind, protocol)


def _tls_begins() -> None:
    """Called where the connection is made, or in a copy of its context."""
    _dialling.get().tls_began_at = perf_counter()


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
