"""What a receiver asks for when it has had enough (pure): `Retry-After`, RFC 9110, 10.2.3.

It is the receiver's text, so it may be anything; how much of the wish is granted is the engine's to
decide.
"""

from datetime import UTC, datetime

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
