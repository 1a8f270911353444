"""One watch: the attempts since its resume token, and then the live tail without a gap.

It ends when its bearer token expires, when it reads too slowly, and when the server stops. The
caller continues with the last resume token.
"""

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from time import monotonic, time
from uuid import UUID

from core.encryption import KeyRing, UndecryptableSecret
from core.errors import InvalidArgument, Unauthenticated
from core.postgres.protocols import Executor
from server.deliveries.tail import Position, Recorded, Snapshot, Tail, Watcher, read_recorded


@dataclass(frozen=True, slots=True)
class News:
    """An attempt, or None as a keepalive. The watch continues after `position`."""

    position: Position
    recorded: Recorded | None


class Watch:
    """Yields the attempts of one watcher from a position on."""

    def __init__(
        self,
        pool: Executor,
        tail: Tail,
        watcher: Watcher,
        *,
        since: Snapshot | None,
        keep_alive_seconds: float,
        expires_at: float,
        clock: Callable[[], float] = time,
    ):
        self._pool = pool
        self._tail = tail
        self._watcher = watcher
        # A watch without a resume token skips the attempts that this snapshot contains.
        self._since = since
        self._keep_alive_seconds = keep_alive_seconds
        self._expires_at = expires_at
        self._clock = clock
        self._position = Position(0)

    async def follow(self, start: Position) -> AsyncGenerator[News]:
        """Yield all attempts after `start`, and keepalives at first and in quiet times."""
        self._position = start
        yield News(start, None)
        async for news in self._catch_up():
            yield news
        self._tail.add(self._watcher)
        try:
            await self._wait_to_join()
            # The attempts between the last read here and the next read of the tail.
            async for news in self._catch_up():
                yield news
            async for news in self._live():
                yield news
        finally:
            self._tail.remove(self._watcher)

    async def _catch_up(self) -> AsyncGenerator[News]:
        """Read up to the newest attempt. Most of the read attempts may be other merchants'."""
        full, yielded_at = True, monotonic()
        while full:
            self._check()
            async with self._tail.catching_up:
                batch = await read_recorded(self._pool, self._position, [self._watcher.merchant_id])
            self._position, full = batch.end, batch.full
            for recorded in batch.recorded:
                if self._watcher.wants(recorded) and self._is_new(recorded):
                    yield News(recorded.position, recorded)
                    yielded_at = monotonic()
            if full and monotonic() - yielded_at >= self._keep_alive_seconds:
                yield News(self._position, None)
                yielded_at = monotonic()

    def _is_new(self, recorded: Recorded) -> bool:
        return self._since is None or not self._since.has(recorded.position.xid)

    async def _live(self) -> AsyncGenerator[News]:
        while True:
            self._check()
            pending, self._watcher.pending = self._watcher.pending, []
            for recorded in pending:
                # Skip attempts that _catch_up() has yielded.
                if recorded.position > self._position and self._is_new(recorded):
                    yield News(recorded.position, recorded)
                    self._check()
            self._watcher.news.clear()
            if self._watcher.pending or self._watcher.ended:
                continue
            self._position = max(self._position, self._tail.position or self._position)
            if not await self._wait():
                self._check()
                yield News(self._position, None)

    async def _wait_to_join(self) -> None:
        while not self._watcher.joined:
            self._check()
            self._watcher.news.clear()
            await self._wait()

    async def _wait(self) -> bool:
        """Return whether an attempt arrived within the keepalive time and the token's time."""
        remaining = self._expires_at - self._clock()
        try:
            async with asyncio.timeout(max(min(self._keep_alive_seconds, remaining), 0)):
                await self._watcher.news.wait()
        except TimeoutError:
            return False
        return True

    def _check(self) -> None:
        if self._watcher.ended is not None:
            raise self._watcher.ended
        if self._clock() >= self._expires_at:
            raise Unauthenticated(
                "the token of this watch has expired: watch again with a new token and the last "
                "resume_token",
                reason="TOKEN_EXPIRED",
            )


#: Lifetime of a resume token.
GOOD_FOR_SECONDS = 3600


class ResumeTokens:
    """Encrypts positions of one watch, so that they cannot be forged. `watch` is its identity."""

    def __init__(self, keyring: KeyRing, *watch: object, clock: Callable[[], float] = time):
        self._keyring = keyring
        self._clock = clock
        digest = hashlib.sha256(repr(("watch", watch)).encode()).digest()
        # Replaces the webhook config's id, so that a token opens only for this watch.
        self._bound_to = UUID(bytes=digest[:16])

    def seal(self, position: Position) -> str:
        text = f"{self._clock():.0f} {position.xid} {position.delivery_id.hex} {position.number}"
        key_id, record = self._keyring.encrypt(text, self._bound_to)
        return f"{key_id}.{base64.urlsafe_b64encode(record).decode()}"

    def open(self, token: str) -> Position:
        """Return the position. Raises InvalidArgument for another watch or after an hour."""
        key_id, _, encoded = token.partition(".")
        try:
            record = base64.b64decode(encoded, altchars=b"-_", validate=True)
            text = self._keyring.decrypt(key_id, record, self._bound_to)
        except (ValueError, UndecryptableSecret):
            raise _refused(
                "belongs to another watch: leave it empty, or use the same filters"
            ) from None
        sealed_at, xid, delivery_id, number = text.split(" ")
        if self._clock() - int(sealed_at) > GOOD_FOR_SECONDS:
            raise _refused(
                "is older than an hour: leave it empty, and list the deliveries since then"
            )
        return Position(int(xid), UUID(delivery_id), int(number))


def _refused(description: str) -> InvalidArgument:
    return InvalidArgument.of("resume_token", description, reason="RESUME_TOKEN_INVALID")
