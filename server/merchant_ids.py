"""The form of merchants' ids, which the platform gives: in tokens, events and filters alike."""

import re

from core.errors import FieldViolation, InvalidArgument

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
