"""The payload of every benchmark: 512 bytes of JSON, like a payment event."""

import json

_REST = json.dumps({"id": "pay_0123456789", "amount": 4200, "currency": "EUR", "note": "x" * 379})

PAYLOAD = json.dumps(
    {"id": "pay_0123456789", "amount": 4200, "currency": "EUR", "note": "x" * 435}
).encode()

# Of fixed width, so that the receiver needs no JSON parser.
_STAMP = '{"sent_at": %017.6f, "sequence": "%010d", '


def stamped(sent_at: float, sequence: int) -> bytes:
    """Return the payload with a time and a number."""
    return (_STAMP % (sent_at, sequence) + _REST[1:]).encode()


def stamp_of(payload: bytes) -> tuple[float, int]:
    """Return the time and the number of a stamped payload."""
    return float(payload[12:29]), int(payload[44:54])
