"""Pings a URL at registration, and refuses it unless deliveries could arrive.

`cli` wires the port to the client of deliveries. The merchant cannot verify the ping's signature
yet, so a refusal such as 401 or 400 proves as much as 200.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from core.errors import FailedPrecondition, InvalidArgument, Unavailable
from core.lifecycle import AttemptResult, Outcome

#: Nothing at this URL receives webhooks.
_NO_RECEIVER = frozenset({404, 410})


class Pinger(Protocol):
    """Sends one signed `webhook.ping`. Failures of the receiver are results, never exceptions."""

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
    """Return whether deliveries could succeed: any status but redirects, 404, 410 and 5xx."""
    status = result.status_code
    if status is None or status in _NO_RECEIVER:
        return False
    return 200 <= status < 300 or 400 <= status < 500


def require_reachable(result: AttemptResult) -> None:
    """Raise the refusal that fits the result of a ping, or return."""
    if is_reachable(result):
        return
    if result.outcome is Outcome.REFUSED:
        raise InvalidArgument.of(
            "webhook_config.url", result.detail, reason="URL_ADDRESS_NOT_ALLOWED"
        )
    if result.outcome is Outcome.INTERNAL_ERROR:
        raise Unavailable(
            f"the ping failed because of an internal error: {result.detail}. Repeat the call later",
            reason="PING_NOT_POSSIBLE",
        )
    raise FailedPrecondition(
        f"the URL did not answer the ping: {result.detail}. Make it answer a POST with any 2xx or "
        "4xx but 404 and 410, then repeat the call",
        reason="URL_UNREACHABLE",
        metadata={"outcome": result.outcome.value, "status_code": str(result.status_code or 0)},
    )
