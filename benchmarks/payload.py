"""The payload of every benchmark: 512 bytes of JSON, as a payment event has."""

import json

PAYLOAD = json.dumps(
    {"id": "pay_0123456789", "amount": 4200, "currency": "EUR", "note": "x" * 435}
).encode()
