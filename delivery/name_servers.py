"""The system's name servers, asked without a thread for each question.

c-ares reads /etc/hosts and /etc/resolv.conf as libc does, and keeps answers for their TTL, at most
an hour. Why it and not getaddrinfo(): docs/decisions/dns.md.
"""

import socket
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

import aiodns
import pycares

#: How long a server is waited for at first, before c-ares has learnt how fast it is; it then waits
#: as little as 0.25 s, and twice as long with each try. Four tries give a slow zone 3.75 s.
_TRY_SECONDS = 1.0
_TRIES = 4
#: After so many look-ups c-ares begins anew: it keeps whole answers, and has no bound for how many.
_LOOKUPS_MAX = 200

_NO_SUCH_NAME = frozenset({pycares.errno.ARES_ENOTFOUND, pycares.errno.ARES_ENODATA})
_NO_ANSWER = frozenset(
    {pycares.errno.ARES_ETIMEOUT, pycares.errno.ARES_ECONNREFUSED, pycares.errno.ARES_ESERVFAIL}
)


class Names(Protocol):
    """Whatever turns an absolute name into its addresses, or raises `socket.gaierror`."""

    async def look_up(self, name: str) -> Sequence[str]: ...

    async def close(self) -> None: ...


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
        if self._asked == _LOOKUPS_MAX:
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
