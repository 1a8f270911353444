"""Page sizes and opaque page tokens (AIP-158), which hold a position and a hash of the list."""

import base64
import hashlib
from collections.abc import Callable, Sequence

from google.protobuf.message import Message

from core.errors import InvalidArgument

#: gRPC clients refuse messages above 4 MiB by default.
_PAGE_BYTES_MAX = 3 * 1024 * 1024


def page_size(requested: int, *, default: int, maximum: int) -> int:
    """Return the size to use. Larger requests get the maximum; negative ones raise an error."""
    if requested < 0:
        raise InvalidArgument.of(
            "page_size", f"must be 0 (meaning {default}) to {maximum}", reason="PAGE_SIZE_INVALID"
        )
    return min(requested or default, maximum)


def fitting[M: Message](messages: Sequence[M]) -> Sequence[M]:
    """Return the first messages that fit into one page, at least one."""
    size = 0
    for index, message in enumerate(messages):
        size += message.ByteSize()
        if size > _PAGE_BYTES_MAX and index:
            return messages[:index]
    return messages


def page_token(position: str, *list_identity: object) -> str:
    """Return a token that continues after `position` in the list with this identity."""
    content = _fingerprint(list_identity) + position.encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def parse_page_token[T](token: str, parse: Callable[[str], T], *list_identity: object) -> T | None:
    """Return the position in a token, or None for the first page.

    Raises InvalidArgument for a token of another list. A token is not signed, so `parse` must raise
    ValueError for every text that is not a position.
    """
    if not token:
        return None
    try:
        content = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        if content[:8] == _fingerprint(list_identity):
            return parse(content[8:].decode("ascii"))
    except ValueError:
        pass
    raise InvalidArgument.of(
        "page_token",
        "is not a token of this list: leave it empty to start again, with the same filters",
        reason="PAGE_TOKEN_INVALID",
    )


def _fingerprint(list_identity: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(list_identity).encode()).digest()[:8]
