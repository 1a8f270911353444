"""A signed ping through the same dialler, headers and deadline as every delivery."""

from collections.abc import Callable, Mapping, Sequence
from time import time
from uuid import UUID

import orjson

from core.ids import format_id, new_id
from core.lifecycle import AttemptResult
from delivery.destination import Destination
from delivery.dialler import Dialler
from delivery.send import send
from delivery.sign import request_headers


async def ping(
    dialler: Dialler,
    timeout_seconds: float,
    *,
    url: str,
    webhook_id: UUID,
    secrets: Sequence[str],
    headers: Mapping[str, str],
    clock: Callable[[], float] = time,
) -> AttemptResult:
    """POST a `webhook.ping` and say what came back; nothing is stored."""
    body = orjson.dumps({"type": "webhook.ping", "webhook_id": format_id("wh", webhook_id)})
    signed = request_headers(
        content_type="application/json",
        event_type="webhook.ping",
        message_id=format_id("evt", new_id()),
        secrets=secrets,
        timestamp=int(clock()),
        body=body,
    )
    return await send(dialler, Destination(url, headers), signed, body, timeout_seconds)
