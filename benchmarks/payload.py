"""The payload of every benchmark: 512 bytes of JSON, as a payment event has."""

import json

_REST = json.dumps({"id": "pay_0123456789", "amount": 4200, "currency": "EUR", "note": "x" * 379})

PAYLOAD = json.dumps(
    {"id": "pay_0123456789", "amount": 4200, "currency": "EUR", "note": "x" * 435}
).encode()

# Of fixed width, so that the receiver finds both without parsing JSON.
_STAMP = '{"sent_at": %017.6f, "sequence": "%010d", '


def stamped(sent_at: float, sequence: int) -> bytes:
    """The same, with the time and the number of its publishing."""
    return (_STAMP % (sent_at, sequence) + _REST[1:]).encode()


def stamp_of(payload: bytes) -> tuple[float, int]:
    """What `stamped` wrote: time and number."""
    return float(payload[12:29]), int(payload[44:54])
