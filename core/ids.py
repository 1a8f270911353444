"""Ids: UUIDv7 inside, so that they sort by time; a prefix and 32 hexadecimal digits outside.

The prefix says what an id is of, so that a wrong paste is told apart from an unknown id. No id
holds a dot, which Standard Webhooks reserves as its separator.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

import uuid_utils
from asyncpg.pgproto import pgproto

IdKind = Literal["wh", "evt", "dlv"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEX = re.compile(r"[0-9a-f]{32}")


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): ascending within a process, near enough to ascending between them."""
    # As those that are read from PostgreSQL are: made, and sent there, in a third of the time.
    made: UUID = pgproto.UUID(uuid_utils.uuid7().bytes)
    return made


def first_id_at(moment: datetime, shift: timedelta = timedelta()) -> UUID:
    """The lowest id of this millisecond: ids of [start, end) are between those of start and end.

    `shift` is how far the clock that made the ids may be from the moment's. Before 1970 there are
    none: the lowest of all.
    """
    # Not timestamp(), which is a float and may round a millisecond up.
    milliseconds = (moment - _EPOCH + shift) // timedelta(milliseconds=1)
    return UUID(int=max(milliseconds, 0) << 80)


def format_id(kind: IdKind, value: UUID) -> str:
    return f"{kind}_{value.hex}"


def parse_id(kind: IdKind, text: str) -> UUID | None:
    """The UUID in a prefixed id, or None when the text is not an id of this kind."""
    prefix, _, digits = text.partition("_")
    if prefix != kind or not _HEX.fullmatch(digits):
        return None
    return UUID(hex=digits)
