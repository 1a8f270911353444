"""Resume tokens of watches: sealed, so that a position cannot be made up, and good for an hour."""

import base64
import hashlib
from collections.abc import Callable
from time import time
from uuid import UUID

from core.errors import InvalidArgument
from core.keyring import KeyRing, UndecryptableSecret
from server.tail import Position

GOOD_FOR_SECONDS = 3600


class ResumeTokens:
    """Seals positions of one watch; `watch` is its merchant and its filters."""

    def __init__(self, keyring: KeyRing, *watch: object, clock: Callable[[], float] = time):
        self._keyring = keyring
        self._clock = clock
        digest = hashlib.sha256(repr(("watch", watch)).encode()).digest()
        # In the place of a webhook config's id: what is sealed for one use opens for no other.
        self._bound_to = UUID(bytes=digest[:16])

    def seal(self, position: Position) -> str:
        text = f"{self._clock():.0f} {position.xid} {position.delivery_id.hex} {position.number}"
        key_id, record = self._keyring.encrypt(text, self._bound_to)
        return f"{key_id}.{base64.urlsafe_b64encode(record).decode()}"

    def open(self, token: str) -> Position:
        """The position; InvalidArgument when it was not sealed for this watch within the hour."""
        key_id, _, encoded = token.partition(".")
        try:
            record = base64.b64decode(encoded, altchars=b"-_", validate=True)
            text = self._keyring.decrypt(key_id, record, self._bound_to)
        except (ValueError, UndecryptableSecret):
            raise _refused(
                "is not one of this watch: leave it empty, or keep the filters"
            ) from None
        sealed_at, xid, delivery_id, number = text.split(" ")
        if self._clock() - int(sealed_at) > GOOD_FOR_SECONDS:
            raise _refused(
                "is older than an hour: leave it empty, and list the deliveries of the time between"
            )
        return Position(int(xid), UUID(delivery_id), int(number))


def _refused(description: str) -> InvalidArgument:
    return InvalidArgument.of("resume_token", description, reason="RESUME_TOKEN_INVALID")
