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
#: And it is waited for no longer than this: the verdict stands, and others need the place.
_BODY_SECONDS_MAX = 1.0


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
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_seconds
    try:
        async with asyncio.timeout_at(deadline) as timer:
            response = await session.post(url, data=body, headers=headers, allow_redirects=False)
            answered = perf_counter()
            timer.reschedule(min(deadline, now() + _BODY_SECONDS_MAX))
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


async def _drain(response: aiohttp.ClientResponse) -> None:
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > _BODY_BYTES_MAX:
            return


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
