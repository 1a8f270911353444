"""Stage: one bounded POST. A receiver that fails is a value here, never an exception.

The total deadline is our own timer: it covers DNS, connect, TLS, a dripping header and an endless
row of 1xx answers alike. The status line decides; what the body does afterwards changes nothing.
"""

import asyncio
from collections.abc import Mapping
from time import perf_counter

import aiohttp
from yarl import URL

from core.lifecycle import AttemptResult
from delivery.outcome import outcome_of_error, outcome_of_status

#: An answer's body up to this is read, so that the connection can be used again.
_BODY_BYTES_MAX = 16 * 1024


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
    try:
        async with asyncio.timeout(timeout_seconds):
            response = await _post(session, url, body, headers)
            answered = perf_counter()
            await _drain(response)
    except Exception as error:
        if response is None:
            verdict = outcome_of_error(error)
            if verdict is None:
                raise
            return AttemptResult(verdict[0], None, verdict[1], _microseconds(began, perf_counter()))
    finally:
        if response is not None:
            # Gives a drained connection back to the pool, and closes one that is not.
            response.close()
    outcome, detail = outcome_of_status(response.status)
    return AttemptResult(outcome, response.status, detail, _microseconds(began, answered))


async def _post(
    session: aiohttp.ClientSession, url: URL, body: bytes, headers: Mapping[str, str]
) -> aiohttp.ClientResponse:
    try:
        return await session.post(url, data=body, headers=headers, allow_redirects=False)
    except aiohttp.ServerDisconnectedError:
        # Most likely a pooled connection the receiver had closed meanwhile, which says nothing
        # about the receiver's health: once more, within the same attempt and deadline.
        return await session.post(url, data=body, headers=headers, allow_redirects=False)


async def _drain(response: aiohttp.ClientResponse) -> None:
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > _BODY_BYTES_MAX:
            return


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
