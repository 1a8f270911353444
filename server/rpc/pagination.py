"""Page sizes and opaque page tokens (AIP-158): where the next page begins, and of which list."""

import base64
import hashlib
from collections.abc import Callable, Sequence

from google.protobuf.message import Message

from core.errors import InvalidArgument

#: Clients that were not told otherwise refuse what is larger than 4 MiB.
_PAGE_BYTES_MAX = 3 * 1024 * 1024


def page_size(requested: int, *, default: int, maximum: int) -> int:
    """The size to use; larger requests get the maximum, negative ones are an error."""
    if requested < 0:
        raise InvalidArgument.of(
            "page_size", f"must be 0 (meaning {default}) to {maximum}", reason="PAGE_SIZE_INVALID"
        )
    return min(requested or default, maximum)


def fitting[M: Message](messages: Sequence[M]) -> Sequence[M]:
    """As many of the first as a page has room for in bytes; one in any case."""
    size = 0
    for index, message in enumerate(messages):
        size += message.ByteSize()
        if size > _PAGE_BYTES_MAX and index:
            return messages[:index]
    return messages


def page_token(position: str, *list_identity: object) -> str:
    """A token that continues after `position` of the list that `list_identity` tells apart."""
    content = _fingerprint(list_identity) + position.encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def parse_page_token[T](token: str, parse: Callable[[str], T], *list_identity: object) -> T | None:
    """The position in a token, None for the first page; a token of another list is refused.

    A token is not signed, so `parse` must raise ValueError for whatever is no position.
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
        "is not a token of this list: leave it empty to begin anew, with the same filters",
        reason="PAGE_TOKEN_INVALID",
    )


def _fingerprint(list_identity: tuple[object, ...]) -> bytes:
    return hashlib.sha256(repr(list_identity).encode()).digest()[:8]
