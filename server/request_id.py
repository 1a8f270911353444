"""The id of the present call: in its log line, its audit entry, and the errors its caller sees."""

import re
import secrets
from collections.abc import Iterable
from contextvars import ContextVar

METADATA_KEY = "x-request-id"

_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{8,64}")

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")


def begin_request(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Take the caller's id when it is well-formed, else make one; it holds for this call's task."""
    given = next((value for key, value in metadata if key == METADATA_KEY), "")
    if not isinstance(given, str) or not _WELL_FORMED.fullmatch(given):
        given = secrets.token_hex(8)
    current_request_id.set(given)
    return given
