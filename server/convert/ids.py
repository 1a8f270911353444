"""Ids as callers write them, and what is said of those that nobody has."""

from collections.abc import Mapping
from uuid import UUID

from core.errors import InvalidArgument, NotFound
from core.ids import IdKind, parse_id

_NAMES: Mapping[IdKind, str] = {"wh": "webhook config", "evt": "event", "dlv": "delivery"}


def id_of(kind: IdKind, text: str) -> UUID:
    """The UUID in an id that a call is about; a text that is none is simply unknown."""
    value = parse_id(kind, text)
    if value is None:
        raise not_found(kind, text)
    return value


def optional_id_of(kind: IdKind, text: str, field: str) -> UUID | None:
    """The UUID in a filter; None when it is empty, InvalidArgument when it is not an id."""
    value = parse_id(kind, text) if text else None
    if text and value is None:
        raise InvalidArgument.of(
            field,
            f"must be the {_NAMES[kind]}'s id: {kind}_ and 32 hexadecimal digits",
            reason="ID_INVALID",
        )
    return value


def not_found(kind: IdKind, text: str) -> NotFound:
    """The same words for an id that is unknown, malformed, deleted or another merchant's."""
    return NotFound(
        f"there is no {_NAMES[kind]} with the id {text[:80]!r}",
        reason=f"{_NAMES[kind].upper().replace(' ', '_')}_NOT_FOUND",
    )
