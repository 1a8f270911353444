"""Sends a signed ping with the same client, headers and checks as a delivery."""

from collections.abc import Callable, Mapping, Sequence
from time import time
from uuid import UUID

import orjson

from core.ids import format_id, new_id
from core.lifecycle import AttemptResult, Outcome
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url
from delivery.http.client import WebhookClient
from delivery.http.request import RequestTemplate
from delivery.send import send
from delivery.sign import request_headers


async def ping(
    client: WebhookClient,
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
    """POST a `webhook.ping` and return the result. Nothing is stored.

    A stored URL that is no longer allowed gets the outcome REFUSED.
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
    return await send(client, RequestTemplate(canonical, headers), signed, body, timeout_seconds)
