"""Parsing of the Retry-After header (RFC 9110, section 10.2.3)."""

from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delivery.send import parse_retry_after

#: Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110's examples.
NOW = 784_111_777.0


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("0", None, 0),
        ("120", None, 120),
        ("007", None, 7),
        ("9999999999", None, 9_999_999_999),
        ("Sun, 06 Nov 1994 08:50:37 GMT", None, 60),
        ("Sunday, 06-Nov-94 08:50:37 GMT", None, 60),
        ("Sun Nov  6 08:50:37 1994", None, 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None, 0),
        # The Date header shows that the receiver's clock is an hour ahead.
        ("Sun, 06 Nov 1994 09:50:37 GMT", "Sun, 06 Nov 1994 09:49:37 GMT", 60),
        ("Sun, 06 Nov 1994 08:50:37 GMT", "yesterday", 60),
        ("120", "Sun, 06 Nov 1994 09:49:37 GMT", 120),
    ],
)
def test_retry_after_accepts_seconds_and_dates(
    value: str, date: str | None, seconds: float
) -> None:
    assert parse_retry_after(value, date, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *["", " ", "-1", "+1", "1.5", "1e3", "0x10", "inf", "nan", "1_000", "1 000", "soon"],
        *["٣", "²", "9" * 11, "9" * 5000, "1, 2", "120;", "\ud800"],
        "Sun, 06 Nov 1994 08:49:36 GMT",
        "Sun, 06 Nov 1994 08:50:37 PST",
        "Sun, 06 Nov 1994 08:50:37",
        "Sun, 31 Feb 1994 08:50:37 GMT",
        "Sun, 06 Nov 99999 08:50:37 GMT",
        "Sun, 06 Nov 1994 08:50:61 GMT",
        "1994-11-06T08:50:37Z",
    ],
)
def test_retry_after_ignores_other_values(value: str) -> None:
    assert parse_retry_after(value, None, NOW) is None


@given(st.text(), st.none() | st.text())
def test_retry_after_accepts_any_text_without_error(value: str, date: str | None) -> None:
    seconds = parse_retry_after(value, date, NOW)
    assert seconds is None or 0 <= seconds < 10**12


@given(st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)))  # noqa: DTZ001
def test_retry_after_accepts_every_http_date(moment: datetime) -> None:
    whole = moment.replace(microsecond=0)
    seconds = parse_retry_after(format_datetime(whole, usegmt=True), None, NOW)
    wanted = whole.timestamp() - NOW
    assert seconds == (wanted if wanted >= 0 else None)
