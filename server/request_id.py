"""The id of the present call: in its log line, its audit entry, and the errors its caller sees."""

import re
from collections.abc import Iterable
from contextvars import ContextVar
from random import getrandbits

METADATA_KEY = "x-request-id"

_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{8,64}")

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")


def begin_request(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Take the caller's id when it is well-formed, else make one; it holds for this call's task."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str) and _WELL_FORMED.fullmatch(value):
            request_id = value
            break
    else:
        # It tells calls apart, and is no secret.
        request_id = f"{getrandbits(64):016x}"
    current_request_id.set(request_id)
    return request_id
