"""Ids: UUIDv7 inside, so that they sort by time; a prefix and 32 hexadecimal digits outside.

The prefix says what an id is of, so that a wrong paste is told apart from an unknown id. No id
holds a dot, which Standard Webhooks reserves as its separator.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from uuid_utils.compat import uuid7

IdKind = Literal["wh", "evt", "dlv"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEX = re.compile(r"[0-9a-f]{32}")


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): ascending within a process, near enough to ascending between them."""
    return uuid7()


def first_id_at(moment: datetime) -> UUID:
    """The lowest id of this millisecond: ids of [start, end) are between those of start and end."""
    # Not timestamp(), which is a float and may round a millisecond up.
    milliseconds = (moment - _EPOCH) // timedelta(milliseconds=1)
    return UUID(int=milliseconds << 80)


def format_id(kind: IdKind, value: UUID) -> str:
    return f"{kind}_{value.hex}"


def parse_id(kind: IdKind, text: str) -> UUID | None:
    """The UUID in a prefixed id, or None when the text is not an id of this kind."""
    prefix, _, digits = text.partition("_")
    if prefix != kind or not _HEX.fullmatch(digits):
        return None
    return UUID(hex=digits)
