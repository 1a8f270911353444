"""Ids as callers write them, and what is said of those that nobody has."""

import re
from collections.abc import Mapping
from uuid import UUID

from core.errors import FieldViolation, InvalidArgument, NotFound
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


# The form of merchants' ids, which the platform gives: in tokens, events and filters alike.

_MERCHANT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_merchant_id(text: str) -> bool:
    """Whether a merchant can be called so."""
    return _MERCHANT_ID.fullmatch(text) is not None


def wrong_merchant_id(field: str) -> FieldViolation:
    """The violation for a text that is no merchant's id."""
    return FieldViolation(field, "must be 1 to 64 of A-Z a-z 0-9 _ -", "MERCHANT_ID_INVALID")


def check_merchant_id(text: str) -> None:
    """InvalidArgument, for the field `merchant_id`, when no merchant can have this id."""
    if not is_merchant_id(text):
        raise InvalidArgument(wrong_merchant_id("merchant_id"))
