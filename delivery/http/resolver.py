"""Resolves names with c-ares: look-ups are limited, shared, and checked by the guard."""

import asyncio
import random
import socket
from collections.abc import Sequence
from time import monotonic
from typing import Protocol
from weakref import WeakSet

import aiodns
import pycares
from aiohttp.abc import AbstractResolver, ResolveResult

from core.addresses import AddressPolicy
from delivery.http.guard import refuse_unless_allowed

#: Concurrent look-ups. Further ones wait, within their timeout.
_LOOKUPS_MAX = 1000
#: Addresses of each family per attempt. aiohttp opens a socket to each of them, and tries again
#: without the first one if all fail.
_PER_FAMILY_MAX = 4
#: Above this number the result is kept for a while, because a look-up costs 14 us per address.
_MANY = 100
_KEPT_SECONDS = 60.0
_KEPT_MAX = 1000
#: Sockets that one attempt opens at most while it connects.
RACED_MAX = 2 * _PER_FAMILY_MAX


class Names(Protocol):
    """Resolves an absolute name to its addresses, or raises `socket.gaierror`."""

    async def look_up(self, name: str) -> Sequence[str]: ...

    async def close(self) -> None: ...


class GuardedResolver(AbstractResolver):
    """Resolves a name if all of its addresses are allowed, and refuses it otherwise.

    A name with one inner address among public ones is an attack that retries until it hits. The
    result is a random selection of the addresses. DNS failures and timeouts raise
    `socket.gaierror`, which aiohttp turns into ClientConnectorDNSError.
    """

    def __init__(self, policy: AddressPolicy, names: Names, *, timeout_seconds: float = 5.0):
        self._policy = policy
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(_LOOKUPS_MAX)
        self._running: dict[str, asyncio.Task[Sequence[str]]] = {}
        # For names with many addresses, the last result and its expiry.
        self._kept: dict[str, tuple[Sequence[str], float]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        few = await self._select_addresses(host.rstrip(".").lower())
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=family,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in few
        ]

    async def close(self) -> None:
        for running in self._running.values():
            running.cancel()
        await self._names.close()

    async def _select_addresses(self, name: str) -> Sequence[str]:
        """Check all addresses of the name and return some of them."""
        few, until = self._kept.get(name, ((), 0.0))
        if monotonic() < until:
            return few
        addresses = await self._addresses_of(name)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        for address in addresses:
            refuse_unless_allowed(self._policy, address)
        few = tuple(_few(addresses))
        if len(addresses) > _MANY:
            if len(self._kept) >= _KEPT_MAX:
                self._kept.clear()
            self._kept[name] = few, monotonic() + _KEPT_SECONDS
        return few

    async def _addresses_of(self, name: str) -> Sequence[str]:
        if name == "localhost" or name.endswith(".localhost"):
            # RFC 6761 forbids a DNS query. Without ::1, so that allowing 127.0.0.0/8 is enough.
            return ("127.0.0.1",)
        # Shielded, because other attempts share the look-up.
        return await asyncio.shield(self._join_lookup(name))

    def _join_lookup(self, name: str) -> asyncio.Task[Sequence[str]]:
        """Return the running look-up of this name, or a new one."""
        running = self._running.get(name)
        if running is None:
            running = self._running[name] = asyncio.create_task(self._look_up(name))
            running.add_done_callback(lambda done: self._finish_lookup(name, done))
        return running

    async def _look_up(self, name: str) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._timeout_seconds), self._slots:
                return await self._names.look_up(name)
        except TimeoutError:
            raise socket.gaierror(
                socket.EAI_AGAIN, f"no answer from DNS within {self._timeout_seconds:g} s"
            ) from None

    def _finish_lookup(self, name: str, done: asyncio.Task[Sequence[str]]) -> None:
        del self._running[name]
        if not done.cancelled():
            # Retrieved here, because all waiting attempts may have timed out.
            done.exception()


def _few(addresses: Sequence[str]) -> list[str]:
    """Return a random selection of each family, so that the next attempt tries others."""
    few: set[str] = set()
    for is_ipv6 in (False, True):
        family = list({address for address in addresses if (":" in address) is is_ipv6})
        few.update(random.sample(family, min(len(family), _PER_FAMILY_MAX)))
    return [address for address in dict.fromkeys(addresses) if address in few]


#: The first wait for a server. c-ares then adapts to its latency, down to 0.25 s, and doubles the
#: wait with each try. Four tries allow 3.75 s for a slow zone.
_TRY_SECONDS = 1.0
_TRIES = 4
#: A channel is replaced after this many look-ups, because the cache of c-ares has no size limit.
_LOOKUPS_PER_CHANNEL = 200

_NO_SUCH_NAME = frozenset({pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA})
_NO_ANSWER = frozenset(
    {pycares.errno.ARES_ETIMEOUT, pycares.errno.ARES_ECONNREFUSED, pycares.errno.ARES_ESERVFAIL}
)


class NameServers:
    """Asks the system's name servers for IPv4 and IPv6 addresses (docs/decisions/dns.md).

    c-ares reads /etc/hosts and /etc/resolv.conf, and caches answers for their TTL, at most an hour.
    `servers` are `host:port`, for tests.
    """

    def __init__(self, servers: Sequence[str] | None = None):
        self._servers = servers
        self._channel = self._new_channel()
        self._lookups = 0
        # Replaced channels with running look-ups.
        self._replaced: WeakSet[aiodns.DNSResolver] = WeakSet()

    def _new_channel(self) -> aiodns.DNSResolver:
        return aiodns.DNSResolver(
            self._servers,
            timeout=_TRY_SECONDS,
            tries=_TRIES,
            # Names are absolute, so search domains (as in Kubernetes) are not used. A trailing dot
            # would hide the name from /etc/hosts.
            flags=pycares.ARES_FLAG_NOSEARCH,
        )

    async def look_up(self, name: str) -> list[str]:
        """Raises `socket.gaierror`: EAI_NONAME, EAI_AGAIN, or EAI_FAIL for anything odd."""
        if self._lookups == _LOOKUPS_PER_CHANNEL:
            # The old channel is closed after its last look-up.
            self._replaced.add(self._channel)
            self._channel, self._lookups = self._new_channel(), 0
        self._lookups += 1
        channel = self._channel
        try:
            found = await channel.getaddrinfo(name, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            raise socket.gaierror(_code_of(error), str(error.args[-1])) from error
        return [node.addr[0].decode("ascii") for node in found.nodes]

    async def close(self) -> None:
        for channel in (*self._replaced, self._channel):
            await channel.close()


def _code_of(error: aiodns.error.DNSError) -> int:
    if error.args[0] in _NO_SUCH_NAME:
        return socket.EAI_NONAME
    return socket.EAI_AGAIN if error.args[0] in _NO_ANSWER else socket.EAI_FAIL
