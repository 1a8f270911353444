"""Stage: sends one request with a deadline. A failing receiver is a result, never an exception.

One timer covers DNS, connect, TLS, a slow header and an endless row of 1xx responses. The status
line decides the outcome, and the body afterwards changes nothing.
"""

import asyncio
import codecs
import re
from datetime import UTC, datetime
from time import perf_counter, time

from aiohttp.http_parser import RawResponseMessage
from aiohttp.streams import StreamReader

from core.lifecycle import AttemptResult, Outcome
from delivery.http.client import Response, WebhookClient
from delivery.http.connector import RequestTrace
from delivery.http.outcome import outcome_of_error, outcome_of_status
from delivery.http.request import RequestTemplate

#: A body up to this size is read, so that the connection can be used again.
_BODY_BYTES_MAX = 16 * 1024
#: The body is read for at most this time, because the slot is needed and the outcome is known.
_BODY_SECONDS_MAX = 1.0
#: Bytes of the body that an attempt records. Escaped they may take four times as much.
EXCERPT_BYTES = 1024
#: Statuses whose Retry-After applies to this request.
_BUSY_STATUSES = (429, 503)
#: Ten digits are 300 years. Longer numbers are ignored.
_RETRY_AFTER_DIGITS_MAX = 10

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DATE_FORMATS = (
    "%a, %d %b %Y %H:%M:%S GMT",
    # Two obsolete formats that recipients must accept (RFC 9110, 5.6.7).
    "%A, %d-%b-%y %H:%M:%S GMT",
    "%a %b %d %H:%M:%S %Y",
)


async def send(
    client: WebhookClient,
    template: RequestTemplate,
    headers: bytes,
    body: bytes,
    timeout_seconds: float,
) -> AttemptResult:
    """POST `body` with the header lines of the template and `headers`.

    Raises only for internal errors, such as headers that cannot be sent, and CancelledError.
    """
    started = perf_counter()
    head = b"%b%bContent-Length: %d\r\n\r\n" % (template.head, headers, len(body))
    trace = RequestTrace(template)
    response: Response | None = None
    responded = started
    beginning = bytearray()
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_seconds
    try:
        async with asyncio.timeout_at(deadline) as timer:
            response = await client.post(trace, head, body)
            responded = perf_counter()
            if not response.body.is_eof():
                timer.reschedule(min(deadline, now() + _BODY_SECONDS_MAX))
            await _drain(response.body, beginning)
    except Exception as error:
        if response is None:
            timed_out = isinstance(error, TimeoutError)
            outcome = outcome_of_error((timed_out and trace.timeout_error) or error)
            if outcome is None:
                raise
            return _result(outcome, None, started, perf_counter(), trace)
    finally:
        if response is not None:
            response.release()
    return _result(
        outcome_of_status(response.head.code),
        response.head.code,
        started,
        responded,
        trace,
        response_excerpt=excerpt(bytes(beginning)),
        retry_after_seconds=_retry_after(response.head),
    )


async def _drain(body: StreamReader, beginning: bytearray) -> None:
    """Read the body up to a limit, and keep its beginning, also if reading fails."""
    size = 0
    while not body.at_eof():
        chunk = await body.readany()
        if size <= EXCERPT_BYTES:
            # One more byte than the excerpt shows that the body was cut.
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
    outcome: tuple[Outcome, str],
    status: int | None,
    started: float,
    ended: float,
    trace: RequestTrace,
    *,
    response_excerpt: str = "",
    retry_after_seconds: float | None = None,
) -> AttemptResult:
    connected_at = trace.connected_at
    return AttemptResult(
        outcome=outcome[0],
        status_code=status,
        detail=outcome[1],
        duration_us=_microseconds(started, ended),
        dns_us=trace.dns_us,
        connect_us=trace.connect_us,
        tls_us=trace.tls_us,
        first_byte_us=None
        if status is None or connected_at is None
        else _microseconds(connected_at, ended),
        remote_address=trace.remote_address,
        response_excerpt=response_excerpt,
        retry_after_seconds=retry_after_seconds,
    )


def _microseconds(started: float, ended: float) -> int:
    return int((ended - started) * 1_000_000)


def excerpt(beginning: bytes) -> str:
    """Return the first bytes as text. Control characters and invalid UTF-8 become \\xNN."""
    if not beginning:
        return ""
    whole = len(beginning) <= EXCERPT_BYTES
    # A character that the limit cuts is left out.
    text, _ = codecs.utf_8_decode(beginning[:EXCERPT_BYTES], "backslashreplace", whole)
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def parse_retry_after(value: str, date: str | None, now: float) -> float | None:
    """Parse Retry-After (RFC 9110, 10.2.3): return seconds from now, or None if it is malformed.

    A date is relative to `date`, the Date header of the response, because the receiver's clock may
    be wrong. Without a valid one it is relative to `now`, in Unix seconds.
    """
    if value.isascii() and value.isdigit():
        return float(value) if len(value) <= _RETRY_AFTER_DIGITS_MAX else None
    until = _parse_date(value)
    if until is None:
        return None
    sent_at = None if date is None else _parse_date(date)
    seconds = until - (now if sent_at is None else sent_at)
    return seconds if seconds >= 0 else None


def _parse_date(text: str) -> float | None:
    """Return the Unix seconds of an HTTP-date, or None."""
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
    return None
