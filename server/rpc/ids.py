"""Parses the ids in requests: of webhook configs, events, deliveries and merchants."""

from collections.abc import Mapping
from uuid import UUID

from core.errors import FieldViolation, InvalidArgument, NotFound
from core.ids import IdKind, is_merchant_id, parse_id

_NAMES: Mapping[IdKind, str] = {"wh": "webhook config", "evt": "event", "dlv": "delivery"}


def id_of(kind: IdKind, text: str) -> UUID:
    """Return the UUID of a resource. A malformed id raises NotFound, like an unknown one."""
    value = parse_id(kind, text)
    if value is None:
        raise not_found(kind, text)
    return value


def optional_id_of(kind: IdKind, text: str, field: str) -> UUID | None:
    """Return the UUID in a filter, or None if it is empty. Raises InvalidArgument."""
    value = parse_id(kind, text) if text else None
    if text and value is None:
        raise InvalidArgument.of(
            field,
            f"must be the {_NAMES[kind]}'s id: {kind}_ and 32 hexadecimal digits",
            reason="ID_INVALID",
        )
    return value


def not_found(kind: IdKind, text: str) -> NotFound:
    """Return one error for an id that is unknown, malformed, deleted or another merchant's."""
    return NotFound(
        f"there is no {_NAMES[kind]} with the id {text[:80]!r}",
        reason=f"{_NAMES[kind].upper().replace(' ', '_')}_NOT_FOUND",
    )


def wrong_merchant_id(field: str) -> FieldViolation:
    """Return the violation for a malformed merchant id."""
    return FieldViolation(field, "must be 1 to 64 of A-Z a-z 0-9 _ -", "MERCHANT_ID_INVALID")


def check_merchant_id(text: str) -> None:
    """Raise InvalidArgument for the field `merchant_id` if the id is malformed."""
    if not is_merchant_id(text):
        raise InvalidArgument(wrong_merchant_id("merchant_id"))
