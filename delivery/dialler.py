"""Everything aiohttp about dialling: pings and deliveries share the session opened here.

No socket is opened to an address that the policy refuses, however the address was come by: a name's
answers are judged all or nothing, and every address, literals included, again as it is dialled.
Redirects and deadlines belong to each request, and so to the sender.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from core.addresses import AddressClass, AddressPolicy
from core.errors import ConfigurationError

# Each lookup blocks a thread, and a dead name server holds it for as long as libc cares to wait.
_LOOKUP_THREADS = 64

Lookup = Callable[[str], Sequence[str]]


class AddressRefused(Exception):  # noqa: N818 - named for what happened, as in core/errors.py
    """The receiver is at an address that is not dialled. Trying again changes nothing.

    Not an OSError: aiohttp takes those for network trouble, tries the next address and forgets why.
    The address itself is left out, since this text may reach the merchant.
    """

    def __init__(self, address_class: AddressClass):
        super().__init__(f"the address of the receiver is not a public one ({address_class})")
        self.address_class = address_class


def refusal_of(error: BaseException) -> AddressRefused | None:
    """Find the refusal behind an error that surfaced from a request, if there is one."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, AddressRefused):
        behind = behind.__cause__ or behind.__context__
    return behind


def look_up(name: str) -> list[str]:
    """Ask the system for every address of an absolute name; blocks."""
    # As bytes, because a str goes through Python's IDNA 2003 codec and its own kind of errors.
    found = socket.getaddrinfo(
        name.encode("ascii"), None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    return [str(sockaddr[0]) for *_, sockaddr in found]


def open_session(
    *,
    policy: AddressPolicy,
    ca_file: Path | None,
    keepalive_seconds: float = 15.0,
    lookup: Lookup = look_up,
) -> aiohttp.ClientSession:
    """Open the one session of a process; raises ConfigurationError when no CA could be trusted.

    A pooled connection is not judged again, so `keepalive_seconds` bounds how long an idle one may
    outlive a change of DNS. `lookup` stands in for the system's resolver.
    """
    tls = _trusting_context(ca_file)
    resolver = GuardedResolver(policy, lookup=lookup)
    return aiohttp.ClientSession(
        connector=_GuardedConnector(resolver, policy, tls, keepalive_seconds),
        # Neither proxies nor ~/.netrc credentials from the operator's environment.
        trust_env=False,
        # One merchant's cookies are nobody's business, least of all another merchant's.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
        skip_auto_headers=("Accept", "User-Agent"),
        read_bufsize=16 * 1024,
        middlewares=(_surface_refusal, _replace_stale_connection),
    )


class GuardedResolver(AbstractResolver):
    """Resolves a name to addresses that may all be dialled, or refuses the name.

    All or nothing, because a name with one inner address among public ones was made to be dialled
    until the inner one is hit. Failures of DNS itself are `socket.gaierror`, which aiohttp turns
    into ClientConnectorDNSError; running out of time is one of them (EAI_AGAIN).
    """

    def __init__(
        self, policy: AddressPolicy, *, lookup: Lookup = look_up, timeout_seconds: float = 5.0
    ):
        self._policy = policy
        self._lookup = lookup
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="dns")
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._addresses_of(host)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        for address in addresses:
            _refuse_unless_allowed(self._policy, address)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=family,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses_of(self, host: str) -> Sequence[str]:
        name = host.rstrip(".").lower()
        if name == "localhost" or name.endswith(".localhost"):
            # By RFC 6761 never a question for DNS; ::1 is left out so that an operator who allows
            # 127.0.0.0/8 has said enough.
            return ("127.0.0.1",)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                # Absolute: a search domain (Kubernetes adds several) would be tried first.
                return await asyncio.shield(self._start_lookup(f"{name}."))
        except TimeoutError:
            raise socket.gaierror(
                socket.EAI_AGAIN, f"no answer from DNS within {self._timeout_seconds:g} s"
            ) from None

    def _start_lookup(self, name: str) -> asyncio.Future[Sequence[str]]:
        """Join the lookup of this name that is already under way, or start one.

        So a name whose server never answers holds one thread, not one for each attempt. Nothing is
        kept once it is answered: the next attempt asks again.
        """
        running = self._running.get(name)
        if running is None:
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, self._lookup, name)
            self._running[name] = running
            running.add_done_callback(lambda done: self._finish_lookup(name, done))
        return running

    def _finish_lookup(self, name: str, done: asyncio.Future[Sequence[str]]) -> None:
        del self._running[name]
        if not done.cancelled():
            # Everybody who waited may have run out of time; asyncio must not log it as unseen.
            done.exception()


class _GuardedConnector(aiohttp.TCPConnector):
    """A connector that judges each address as it is dialled, and closes its resolver."""

    def __init__(
        self,
        resolver: AbstractResolver,
        policy: AddressPolicy,
        tls: ssl.SSLContext,
        keepalive: float,
    ):
        super().__init__(
            resolver=resolver,
            socket_factory=self._open_socket,
            ssl=tls,
            use_dns_cache=False,
            # The engine bounds what is in flight; waiting for a pool would be charged to merchants.
            limit=0,
            keepalive_timeout=keepalive,
        )
        self._factory = partial(_HeadFirst, loop=self._loop)  # type: ignore[assignment]
        self._policy = policy
        self._closes_with_us = resolver

    async def connect(self, *request: Any, **options: Any) -> Connection:
        connection = await super().connect(*request, **options)
        dialling = _dialling.get()
        dialling.connected_at = perf_counter()
        if connection.protocol is not None:
            # Of a pooled connection, too, what was dialled when it was made.
            dialling.remote_address = connection.protocol.remote_address  # type: ignore[attr-defined]
        return connection

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        await self._closes_with_us.close()

    async def _create_connection(self, *request: Any, **options: Any) -> ResponseHandler:
        """Take the time of a new connection, also of one that fails or is given up."""
        began = perf_counter()
        dialling = _dialling.get()
        dialling.dns_us = dialling.connect_us = None
        try:
            return await super()._create_connection(*request, **options)
        finally:
            if dialling.opened:
                elapsed = int((perf_counter() - began) * 1_000_000)
                dialling.connect_us = elapsed - (dialling.dns_us or 0)

    async def _resolve_host(self, *host: Any, **options: Any) -> list[ResolveResult]:
        began = perf_counter()
        try:
            return await super()._resolve_host(*host, **options)
        finally:
            _dialling.get().dns_us = int((perf_counter() - began) * 1_000_000)

    def _open_socket(self, addr_info: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, sockaddr = addr_info
        dialling = _dialling.get()
        try:
            _refuse_unless_allowed(self._policy, sockaddr[0])
        except AddressRefused as refusal:
            dialling.refusals.append(refusal)
            raise
        dialling.opened = True
        dialling.remote_address = str(sockaddr[0])
        return socket.socket(family, kind, protocol)


class _HeadFirst(ResponseHandler):
    """Parses the head of an answer apart from what came with it in one piece.

    Otherwise a fault in the body, such as a Content-Length that is too short, takes with it the
    status line that was fine.
    """

    remote_address: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.remote_address = peer[0] if peer else None

    def data_received(self, data: bytes) -> None:
        head, end, rest = data.partition(b"\r\n\r\n")
        super().data_received(head + end)
        if rest:
            super().data_received(rest)


@dataclass(slots=True)
class Dialling:
    """What dialling came to for one request; without `opened`, a pooled connection was used."""

    opened: bool = False
    refusals: list[AddressRefused] = field(default_factory=list)
    #: The look-up, and TCP with TLS; None for what was not begun.
    dns_us: int | None = None
    connect_us: int | None = None
    #: When there was a connection to send on, by perf_counter(); and what it leads to.
    connected_at: float | None = None
    #: Never one that was refused: that is nobody's business.
    remote_address: str | None = None


# Of the request at hand. Connecting races the addresses in tasks of their own, which copy the
# context and so share what it holds.
_dialling: ContextVar[Dialling] = ContextVar("dialling")


@contextmanager
def record_dialling() -> Iterator[Dialling]:
    """The record of the one request that is made in this block."""
    dialling = Dialling()
    token = _dialling.set(dialling)
    try:
        yield dialling
    finally:
        _dialling.reset(token)


async def _surface_refusal(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Raise the refusal itself when a request failed because of one.

    With several addresses aiohappyeyeballs drops what is neither OSError nor RuntimeError: in its
    place come a bare IndexError or the error of another address.
    """
    recorded = _dialling.get(None)
    with record_dialling() if recorded is None else nullcontext(recorded) as dialling:
        try:
            return await handler(request)
        except Exception as error:
            if dialling.refusals and refusal_of(error) is None:
                raise dialling.refusals[0] from error
            raise


async def _replace_stale_connection(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send once more when a pooled connection turned out to be closed.

    That says nothing about the receiver's health. When a new connection ends without an answer,
    the receiver may have acted on the request: then sending again is for the next attempt.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except aiohttp.ClientConnectionError:
        if _dialling.get().opened:
            raise
    return await handler(request)


def _refuse_unless_allowed(policy: AddressPolicy, text: str) -> None:
    try:
        refusal = policy.refusal(ip_address(text))
    except ValueError:
        refusal = AddressClass.RESERVED
    if refusal is not None:
        raise AddressRefused(refusal)


def _trusting_context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"WEBHOOK_CA_FILE: {ca_file} cannot be used ({error.strerror or error}); name a "
                "readable PEM file of CA certificates, or unset it"
            ) from error
    if not context.cert_store_stats()["x509_ca"] and not _has_certificate_directory():
        raise ConfigurationError(
            "no certificate authority is trusted, so that every delivery would fail: install the "
            "system's CA bundle (Debian: apt-get install ca-certificates) or set WEBHOOK_CA_FILE"
        )
    return context


def _has_certificate_directory() -> bool:
    """OpenSSL reads a hashed directory only when it verifies, so such CAs are not counted yet."""
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("????????.[0-9]"))
