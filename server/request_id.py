"""The id of a call: in its log line, its audit entry, and the errors its caller sees."""

import re
from collections.abc import Sequence
from random import getrandbits

METADATA_KEY = "x-request-id"

_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{8,64}")


def request_id_of(given: Sequence[str | bytes]) -> str:
    """The caller's own: the first that is well-formed, else one that is made."""
    for value in given:
        if isinstance(value, str) and _WELL_FORMED.fullmatch(value):
            return value
    # It tells calls apart, and is no secret.
    return f"{getrandbits(64):016x}"
