"""Converts times and durations of protobuf, and checks times in filters."""

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from core.errors import InvalidArgument

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


def time_range(request: Message) -> tuple[datetime | None, datetime | None]:
    """Return start_time and end_time, None if unset. Raises InvalidArgument for an empty range."""
    start_at = time_filter(request, "start_time")
    end_at = time_filter(request, "end_time")
    if start_at is not None and end_at is not None and start_at >= end_at:
        raise InvalidArgument.of(
            "end_time", "must be later than start_time", reason="TIME_RANGE_EMPTY"
        )
    return start_at, end_at


def time_filter(request: Message, field: str) -> datetime | None:
    """Return the time in a filter, or None. Raises InvalidArgument before 1970."""
    if not request.HasField(field):
        return None
    try:
        moment: datetime = getattr(request, field).ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        moment = _BEFORE_ALL
    if moment < _EPOCH:
        raise InvalidArgument.of(
            field, "must be a time between 1970 and 9999", reason="TIME_INVALID"
        )
    return moment


def timestamp(moment: datetime | None) -> Timestamp | None:
    """Return a Timestamp, or None, which leaves the field unset."""
    if moment is None:
        return None
    message = Timestamp()
    fill_time(message, moment)
    return message


def fill_time(message: Timestamp, moment: datetime) -> None:
    """Set a Timestamp field. FromDatetime takes ten times as long."""
    since = moment - _EPOCH
    message.seconds = since.days * 86_400 + since.seconds
    message.nanos = since.microseconds * 1000


def seconds_of(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def duration_of(seconds: float) -> Duration:
    """Return a Duration, rounded to microseconds."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1_000_000) * 1000)
    return message
