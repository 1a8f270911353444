"""A signed ping through the same dialler, headers and deadline as every delivery."""

from collections.abc import Callable, Mapping, Sequence
from time import time
from uuid import UUID

import orjson

from core.ids import format_id, new_id
from core.lifecycle import AttemptResult, Outcome
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url
from delivery.http.connector import Dialler
from delivery.http.request import Destination
from delivery.send import send
from delivery.sign import request_headers


async def ping(
    dialler: Dialler,
    policy: UrlPolicy,
    timeout_seconds: float,
    *,
    url: str,
    webhook_id: UUID,
    secrets: Sequence[str],
    headers: Mapping[str, str],
    header_prefix: str = "",
    clock: Callable[[], float] = time,
) -> AttemptResult:
    """POST a `webhook.ping` and say what came back; nothing is stored.

    A URL that passed once and passes no more is refused like one at an address we do not call.
    """
    try:
        canonical = parse_webhook_url(url, policy).text
    except UrlRefused as refused:
        return AttemptResult(Outcome.REFUSED, None, refused.message)
    body = orjson.dumps({"type": "webhook.ping", "webhook_id": format_id("wh", webhook_id)})
    signed = request_headers(
        content_type="application/json",
        event_type="webhook.ping",
        message_id=format_id("evt", new_id()),
        secrets=secrets,
        timestamp=int(clock()),
        prefix=header_prefix,
        body=body,
    )
    return await send(dialler, Destination(canonical, headers), signed, body, timeout_seconds)
