"""Names to addresses that may be dialled: look-ups that are bounded, shared and judged."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

from core.addresses import AddressPolicy
from delivery.refusal import refuse_unless_allowed

# Each lookup blocks a thread, and a dead name server holds it for as long as libc cares to wait.
_LOOKUP_THREADS = 64

Lookup = Callable[[str], Sequence[str]]


def look_up(name: str) -> list[str]:
    """Ask the system for every address of an absolute name; blocks."""
    # As bytes, because a str goes through Python's IDNA 2003 codec and its own kind of errors.
    found = socket.getaddrinfo(
        name.encode("ascii"), None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    return [str(sockaddr[0]) for *_, sockaddr in found]


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
            refuse_unless_allowed(self._policy, address)
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
