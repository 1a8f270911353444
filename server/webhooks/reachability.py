"""The port through which a URL is pinged; `cli` wires it to the delivery engine's own dialler.

A ping at registration proves that deliveries could arrive. The merchant cannot verify its signature
yet, so an answer that refuses it (401, 400) proves as much as a 200.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from core.errors import FailedPrecondition, InvalidArgument, Unavailable
from core.lifecycle import AttemptResult, Outcome

#: Answers that say nobody is there who could take webhooks.
_NOBODY_THERE = frozenset({404, 410})


class Pinger(Protocol):
    """Sends one signed `webhook.ping`; what the receiver does is a value, never an exception."""

    async def __call__(
        self,
        *,
        url: str,
        webhook_id: UUID,
        secrets: Sequence[str],
        headers: Mapping[str, str],
        header_prefix: str,
    ) -> AttemptResult: ...


def is_reachable(result: AttemptResult) -> bool:
    """Whether deliveries to this URL could succeed: some answer but a redirect, 404, 410 or 5xx."""
    status = result.status_code
    if status is None or status in _NOBODY_THERE:
        return False
    return 200 <= status < 300 or 400 <= status < 500


def require_reachable(result: AttemptResult) -> None:
    """Refuse a URL by what its ping brought."""
    if is_reachable(result):
        return
    if result.outcome is Outcome.REFUSED:
        raise InvalidArgument.of(
            "webhook_config.url", result.detail, reason="URL_ADDRESS_NOT_ALLOWED"
        )
    if result.outcome is Outcome.INTERNAL_ERROR:
        raise Unavailable(
            f"the URL could not be pinged, by a fault on our side: {result.detail}. Repeat the "
            "call later",
            reason="PING_NOT_POSSIBLE",
        )
    raise FailedPrecondition(
        f"the URL did not answer the ping: {result.detail}. Make it answer a POST with any 2xx or "
        "4xx but 404 and 410, then repeat the call",
        reason="URL_UNREACHABLE",
        metadata={"outcome": result.outcome.value, "status_code": str(result.status_code or 0)},
    )
