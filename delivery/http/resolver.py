"""Names to addresses that may be dialled: look-ups that are bounded, shared and judged."""

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

#: Look-ups at once; more of them wait, within their own time.
_LOOKUPS_MAX = 1000
#: Of each family an attempt has so many addresses, which bounds what it dials: aiohttp races all it
#: is given, a socket each, and when all have failed begins again with all but the first.
_PER_FAMILY_MAX = 4
#: A look-up costs the loop 14 us an address, and of so many it is not made for each connection.
_MANY = 100
_KEPT_SECONDS = 60.0
_KEPT_MAX = 1000
#: Sockets that one attempt has open at most while it connects.
RACED_MAX = 2 * _PER_FAMILY_MAX


class Names(Protocol):
    """Whatever turns an absolute name into its addresses, or raises `socket.gaierror`."""

    async def look_up(self, name: str) -> Sequence[str]: ...

    async def close(self) -> None: ...


class GuardedResolver(AbstractResolver):
    """Resolves a name to addresses that may all be dialled, or refuses the name.

    All or nothing, because a name with one inner address among public ones was made to be dialled
    until the inner one is hit. Of those that pass it gives a few, at random. Failures of DNS
    itself are `socket.gaierror`, which aiohttp turns into ClientConnectorDNSError; running out of
    time is one of them (EAI_AGAIN).
    """

    def __init__(self, policy: AddressPolicy, names: Names, *, timeout_seconds: float = 5.0):
        self._policy = policy
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(_LOOKUPS_MAX)
        self._running: dict[str, asyncio.Task[Sequence[str]]] = {}
        # Of names with many addresses, those given last and until when they are given again.
        self._kept: dict[str, tuple[Sequence[str], float]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        few = await self._few_of(host.rstrip(".").lower())
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

    async def _few_of(self, name: str) -> Sequence[str]:
        """Some of the name's addresses, which are all judged."""
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
            # By RFC 6761 never a question for DNS; ::1 is left out so that an operator who allows
            # 127.0.0.0/8 has said enough.
            return ("127.0.0.1",)
        # An attempt that is given up must not take the look-up from the others.
        return await asyncio.shield(self._join_lookup(name))

    def _join_lookup(self, name: str) -> asyncio.Task[Sequence[str]]:
        """The look-up of this name that is under way, or a new one."""
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
            # Everybody who waited may have run out of time; asyncio must not log it as unseen.
            done.exception()


def _few(addresses: Sequence[str]) -> list[str]:
    """Some of each family, in their order; at random, so that the next attempt tries others."""
    few: set[str] = set()
    for is_ipv6 in (False, True):
        family = list({address for address in addresses if (":" in address) is is_ipv6})
        few.update(random.sample(family, min(len(family), _PER_FAMILY_MAX)))
    return [address for address in dict.fromkeys(addresses) if address in few]


# The system's name servers, asked without a thread for each question.
#
# c-ares reads /etc/hosts and /etc/resolv.conf as libc does, and keeps answers for their TTL, at
# most
# an hour. Why it and not getaddrinfo(): docs/decisions/dns.md.

#: How long a server is waited for at first, before c-ares has learnt how fast it is; it then waits
#: as little as 0.25 s, and twice as long with each try. Four tries give a slow zone 3.75 s.
_TRY_SECONDS = 1.0
_TRIES = 4
#: After so many look-ups c-ares begins anew: it keeps whole answers, and has no bound for how many.
_LOOKUPS_PER_CHANNEL = 200

_NO_SUCH_NAME = frozenset({pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA})
_NO_ANSWER = frozenset(
    {pycares.errno.ARES_ETIMEOUT, pycares.errno.ARES_ECONNREFUSED, pycares.errno.ARES_ESERVFAIL}
)


class NameServers:
    """Asks for all addresses of a name, IPv4 and IPv6; `servers` are `host:port`, for tests."""

    def __init__(self, servers: Sequence[str] | None = None):
        self._servers = servers
        self._ares = self._begin()
        self._asked = 0
        # Those before it that somebody still waits for.
        self._former: WeakSet[aiodns.DNSResolver] = WeakSet()

    def _begin(self) -> aiodns.DNSResolver:
        return aiodns.DNSResolver(
            self._servers,
            timeout=_TRY_SECONDS,
            tries=_TRIES,
            # Every name is absolute: search domains (Kubernetes adds several) are left alone. A dot
            # at its end would do the same, and hide the name from /etc/hosts.
            flags=pycares.ARES_FLAG_NOSEARCH,
        )

    async def look_up(self, name: str) -> list[str]:
        """Raises `socket.gaierror`: EAI_NONAME, EAI_AGAIN, or EAI_FAIL for anything odd."""
        if self._asked == _LOOKUPS_PER_CHANNEL:
            # The one before ends with the last look-up that waits for it.
            self._former.add(self._ares)
            self._ares, self._asked = self._begin(), 0
        self._asked += 1
        ares = self._ares
        try:
            found = await ares.getaddrinfo(name, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError as error:
            raise socket.gaierror(_code_of(error), str(error.args[-1])) from error
        return [node.addr[0].decode("ascii") for node in found.nodes]

    async def close(self) -> None:
        for ares in (*self._former, self._ares):
            await ares.close()


def _code_of(error: aiodns.error.DNSError) -> int:
    if error.args[0] in _NO_SUCH_NAME:
        return socket.EAI_NONAME
    return socket.EAI_AGAIN if error.args[0] in _NO_ANSWER else socket.EAI_FAIL
