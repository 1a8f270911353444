"""The beginning of an answer's body as text that any log, terminal and database takes."""

import asyncio
import codecs
import re
from datetime import UTC, datetime
from time import perf_counter, time
from typing import NamedTuple, cast

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from core.lifecycle import AttemptResult, Outcome
from delivery.http.connection import ReceiverConnection
from delivery.http.connector import Dialler, Dialling
from delivery.http.outcome import outcome_of_error, outcome_of_status
from delivery.http.request import Destination

#: Of the body, in bytes; escaped it may be four times as long.
EXCERPT_BYTES = 1024

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def excerpt(beginning: bytes) -> str:
    """Its first bytes as valid UTF-8; control characters and what is not UTF-8 become \\xNN."""
    if not beginning:
        return ""
    whole = len(beginning) <= EXCERPT_BYTES
    # A character that the cut went through is left out, not shown as broken.
    text, _ = codecs.utf_8_decode(beginning[:EXCERPT_BYTES], "backslashreplace", whole)
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


# What a receiver asks for when it has had enough (pure): `Retry-After`, RFC 9110, 10.2.3.
#
# It is the receiver's text, so it may be anything; how much of the wish is granted is the
# engine's to
# decide.

#: 10 digits are 300 years: whoever sends more means nothing by it.
_DIGITS_MAX = 10
_DATE_FORMATS = (
    "%a, %d %b %Y %H:%M:%S GMT",
    # Two that are obsolete, and have to be understood (RFC 9110, 5.6.7).
    "%A, %d-%b-%y %H:%M:%S GMT",
    "%a %b %d %H:%M:%S %Y",
)


def parse_retry_after(value: str, date: str | None, now: float) -> float | None:
    """Seconds from now, never negative; None when `value` is neither a number of them nor a date.

    A date counts from `date`, the answer's own Date header, since the receiver's clock may be
    wrong; without a good one, from `now` in Unix seconds.
    """
    if value.isascii() and value.isdigit():
        return float(value) if len(value) <= _DIGITS_MAX else None
    until = _parse_date(value)
    if until is None:
        return None
    asked_at = None if date is None else _parse_date(date)
    seconds = until - (now if asked_at is None else asked_at)
    return seconds if seconds >= 0 else None


def _parse_date(text: str) -> float | None:
    """Unix seconds of an HTTP-date."""
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
    return None


# Stage: one bounded POST. A receiver that fails is a value here, never an exception.
#
# The total deadline is our own timer: it covers DNS, connect, TLS, a dripping header and an endless
# row of 1xx answers alike. The status line decides; what the body does afterwards changes nothing.

#: An answer's body up to this is read, so that the connection can be used again.
_BODY_BYTES_MAX = 16 * 1024
#: And it is waited for no longer than this: the verdict stands, and others need the place.
_BODY_SECONDS_MAX = 1.0
#: The statuses whose Retry-After is about this request, not about where else to go.
_BUSY_STATUSES = (429, 503)


async def send(
    dialler: Dialler,
    destination: Destination,
    headers: bytes,
    body: bytes,
    timeout_seconds: float,
) -> AttemptResult:
    """POST `body` under the destination's own header lines and `headers`.

    Raises only for faults of ours, as headers that cannot be sent, and CancelledError.
    """
    began = perf_counter()
    head = b"%b%bContent-Length: %d\r\n\r\n" % (destination.head, headers, len(body))
    dialling = Dialling(destination)
    answer: _Answer | None = None
    answered = began
    beginning = bytearray()
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_seconds
    try:
        async with asyncio.timeout_at(deadline) as timer:
            answer = await _ask(dialler, dialling, head, body)
            answered = perf_counter()
            if not answer.body.is_eof():
                timer.reschedule(min(deadline, now() + _BODY_SECONDS_MAX))
            await _drain(answer.body, beginning)
    except Exception as error:
        if answer is None:
            late = isinstance(error, TimeoutError)
            verdict = outcome_of_error((late and dialling.fault) or error)
            if verdict is None:
                raise
            return _result(verdict, None, began, perf_counter(), dialling)
    finally:
        if answer is not None:
            _let_go(answer)
    verdict = outcome_of_status(answer.head.code)
    return _result(
        verdict,
        answer.head.code,
        began,
        answered,
        dialling,
        response_excerpt=excerpt(bytes(beginning)),
        retry_after_seconds=_retry_after(answer.head),
    )


class _Answer(NamedTuple):
    connection: Connection
    head: RawResponseMessage
    body: StreamReader


async def _ask(dialler: Dialler, dialling: Dialling, head: bytes, body: bytes) -> _Answer:
    """Send, and once more when a pooled connection turned out to be closed.

    That says nothing about the receiver's health. When a new connection ends without an answer,
    the receiver may have acted on the request: then sending again is for the next attempt.
    """
    try:
        return await _ask_once(dialler, dialling, head, body)
    except aiohttp.ClientConnectorError:
        raise
    except aiohttp.ClientConnectionError:
        if dialling.opened:
            raise
    return await _ask_once(dialler, dialling, head, body, anew=True)


async def _ask_once(
    dialler: Dialler, dialling: Dialling, head: bytes, body: bytes, *, anew: bool = False
) -> _Answer:
    connection = await dialler.dial(dialling, anew=anew)
    protocol = cast(ReceiverConnection, connection.protocol)
    try:
        return _Answer(connection, *await protocol.post(head, body))
    except BaseException:
        _hang_up(connection)
        raise


def _let_go(answer: _Answer) -> None:
    """Back to the pool when the answer is over, if aiohttp has no objection."""
    if not answer.body.is_eof():
        _hang_up(answer.connection)
        return
    cast(ReceiverConnection, answer.connection.protocol).rest()
    answer.connection.release()


def _hang_up(connection: Connection) -> None:
    """At once: a close in good order would wait for a receiver that takes nothing any more."""
    if connection.protocol is not None:
        connection.protocol.abort()
    connection.close()


async def _drain(body: StreamReader, beginning: bytearray) -> None:
    """Read the body, at most so much of it, and keep its beginning, also when reading fails."""
    size = 0
    while not body.at_eof():
        chunk = await body.readany()
        if size <= EXCERPT_BYTES:
            # One byte more than is shown tells that it was cut.
            beginning += chunk[: EXCERPT_BYTES + 1 - size]
        size += len(chunk)
        if size > _BODY_BYTES_MAX:
            return


def _retry_after(head: RawResponseMessage) -> float | None:
    if head.code not in _BUSY_STATUSES:
        return None
    value = head.headers.get("Retry-After")
    if value is None:
        return None
    return parse_retry_after(value, head.headers.get("Date"), time())


def _result(
    verdict: tuple[Outcome, str],
    status: int | None,
    began: float,
    ended: float,
    dialling: Dialling,
    *,
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
        tls_us=dialling.tls_us,
        first_byte_us=None if status is None or sent_at is None else _microseconds(sent_at, ended),
        remote_address=dialling.remote_address,
        response_excerpt=response_excerpt,
        retry_after_seconds=retry_after_seconds,
    )


def _microseconds(began: float, ended: float) -> int:
    return int((ended - began) * 1_000_000)
