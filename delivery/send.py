"""Stage: one bounded POST. A receiver that fails is a value here, never an exception.

The total deadline is our own timer: it covers DNS, connect, TLS, a dripping header and an endless
row of 1xx answers alike. The status line decides; what the body does afterwards changes nothing.
"""

import asyncio
from collections.abc import Mapping
from time import perf_counter, time

import aiohttp
from yarl import URL

from core.lifecycle import AttemptResult, Outcome
from delivery.dialler import Dialling, record_dialling
from delivery.excerpt import EXCERPT_BYTES, excerpt
from delivery.outcome import outcome_of_error, outcome_of_status
from delivery.retry_after import parse_retry_after

#: An answer's body up to this is read, so that the connection can be used again.
_BODY_BYTES_MAX = 16 * 1024
#: And it is waited for no longer than this: the verdict stands, and others need the place.
_BODY_SECONDS_MAX = 1.0
#: The statuses whose Retry-After is about this request, not about where else to go.
_BUSY_STATUSES = (429, 503)


async def send(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    headers: Mapping[str, str],
    timeout_seconds: float,
) -> AttemptResult:
    """POST `body`; raises only for faults of ours, and CancelledError."""
    began = perf_counter()
    response: aiohttp.ClientResponse | None = None
    answered = began
    beginning = bytearray()
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_seconds
    with record_dialling() as dialling:
        try:
            async with asyncio.timeout_at(deadline) as timer:
                response = await session.post(
                    url, data=body, headers=headers, allow_redirects=False
                )
                answered = perf_counter()
                timer.reschedule(min(deadline, now() + _BODY_SECONDS_MAX))
                await _drain(response, beginning)
        except Exception as error:
            if response is None:
                verdict = outcome_of_error(error)
                if verdict is None:
                    raise
                return _result(verdict, None, began, perf_counter(), dialling=dialling)
        finally:
            if response is not None:
                # Gives a drained connection back to the pool, and closes one that is not.
                response.close()
    verdict = outcome_of_status(response.status)
    return _result(
        verdict,
        response.status,
        began,
        answered,
        dialling=dialling,
        response_excerpt=excerpt(bytes(beginning)),
        retry_after_seconds=_retry_after(response),
    )


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    if response.status not in _BUSY_STATUSES:
        return None
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    return parse_retry_after(value, response.headers.get("Date"), time())


async def _drain(response: aiohttp.ClientResponse, beginning: bytearray) -> None:
    """Read the body, at most so much of it, and keep its beginning, also when reading fails."""
    size = 0
    async for chunk in response.content.iter_any():
        if size <= EXCERPT_BYTES:
            # One byte more than is shown tells that it was cut.
            beginning += chunk[: EXCERPT_BYTES + 1 - size]
        size += len(chunk)
        if size > _BODY_BYTES_MAX:
            return


def _result(
    verdict: tuple[Outcome, str],
    status: int | None,
    began: float,
    ended: float,
    *,
    dialling: Dialling,
    response_excerpt: str = "",
    retry_after_seconds: float | None = None,
) -> AttemptResult:
    sent_at = dialling.connected_at
    return AttemptResult(
        outcome=verdict[0],
        status_code=status,
        detail=verdict[1],
        duration_us=_microseconds(began, ended),
        dns_us=dialling.dns_us,
        connect_us=dialling.connect_us,
        first_byte_us=None if status is None or sent_at is None else _microseconds(sent_at, ended),
        remote_address=dialling.remote_address,
        response_excerpt=response_excerpt,
        retry_after_seconds=retry_after_seconds,
    )


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
