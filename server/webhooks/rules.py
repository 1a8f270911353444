"""The fields of a webhook config: one table, their checks, and the protobuf message.

A new field is one line of `FIELDS` beside its column and its protobuf field, which have its name.
A draft is a `WebhookConfig` without id and secret that belongs to no session.
"""

import base64
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration

from core.errors import FieldViolation, InvalidArgument
from core.ids import format_id
from core.models import WebhookConfig
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url
from postrider.v1 import webhook_config_pb2
from server.event_types.rules import deprecated_event_type, unknown_subscription
from server.rpc.times import duration_of, seconds_of, timestamp
from server.rpc.validation import description_violations
from server.webhooks.header_rules import header_violations, prefix_violations

_EVENTS_MAX = 100
_RETRIES_MAX = 20
_RETRY_SECONDS = (1.0, 86_400.0)
_TIMEOUT_SECONDS = (1.0, 30.0)
#: The lowest rate is one webhook in 1,000 s. A merchant pauses the config for less.
_RATE_LIMITS = (0.001, 10_000.0)
_IN_FLIGHT_MAX = 1000


def _events_violations(
    path: str, draft: WebhookConfig, unknown: Collection[str], deprecated: Collection[str]
) -> list[FieldViolation]:
    events = draft.events
    if not 1 <= len(events) <= _EVENTS_MAX:
        text = f"must name 1 to {_EVENTS_MAX} event types"
        return [FieldViolation(path, text, "EVENTS_COUNT")]
    if len(set(events)) < len(events):
        return [FieldViolation(path, "names a type twice", "EVENTS_REPEATED")]
    violations = []
    for index, name in enumerate(events):
        if name in unknown:
            violations.append(unknown_subscription(f"{path}[{index}]", name))
        elif name in deprecated:
            violations.append(deprecated_event_type(f"{path}[{index}]", name))
    return violations


def _schedule_violations(path: str, draft: WebhookConfig) -> list[FieldViolation]:
    schedule = draft.retry_schedule_seconds
    if len(schedule) > _RETRIES_MAX:
        text = f"must have at most {_RETRIES_MAX} waits"
        return [FieldViolation(path, text, "RETRY_SCHEDULE_TOO_LONG")]
    shortest, longest = _RETRY_SECONDS
    text = f"must be {shortest:.0f} to {longest:.0f} seconds"
    return [
        FieldViolation(f"{path}[{index}]", text, "RETRY_WAIT_INVALID")
        for index, seconds in enumerate(schedule)
        if not shortest <= seconds <= longest
    ]


def _timeout_violations(path: str, draft: WebhookConfig) -> list[FieldViolation]:
    shortest, longest = _TIMEOUT_SECONDS
    seconds = draft.timeout_seconds
    if seconds is None or shortest <= seconds <= longest:
        return []
    text = f"must be {shortest:.0f} to {longest:.0f} seconds, or unset"
    return [FieldViolation(path, text, "TIMEOUT_INVALID")]


def _rate_violations(path: str, draft: WebhookConfig) -> list[FieldViolation]:
    slowest, fastest = _RATE_LIMITS
    if draft.rate_limit == 0 or slowest <= draft.rate_limit <= fastest:
        return []
    text = f"must be {slowest} to {fastest:.0f} webhooks a second, or 0 for no limit"
    return [FieldViolation(path, text, "RATE_LIMIT_INVALID")]


def _in_flight_violations(path: str, draft: WebhookConfig) -> list[FieldViolation]:
    if 0 <= draft.max_in_flight <= _IN_FLIGHT_MAX:
        return []
    text = f"must be 1 to {_IN_FLIGHT_MAX}, or 0 for the operator's limit"
    return [FieldViolation(path, text, "MAX_IN_FLIGHT_INVALID")]


def _prefix_violations(path: str, draft: WebhookConfig) -> list[FieldViolation]:
    return prefix_violations(path, draft.header_prefix, draft.headers)


def _durations(seconds: Sequence[float]) -> list[Duration]:
    return [duration_of(wait) for wait in seconds]


def _seconds(durations: Sequence[Duration]) -> list[float]:
    return [seconds_of(duration) for duration in durations]


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Field:
    """A field that merchants set at creation and by an update."""

    #: Name in the protobuf message, the update mask and the audit log.
    name: str
    #: Returns the violations of a draft, for a field with this path.
    violations: Callable[[str, WebhookConfig], list[FieldViolation]] | None = None
    #: Convert the protobuf value to the column value, and back.
    to_column: Callable[[Any], Any] = _unchanged
    to_message: Callable[[Any], Any] = _unchanged
    #: Name of the column if it ends in the unit.
    other_column: str = ""
    #: Column value if the protobuf field has presence and is unset.
    default: Any = None

    @property
    def column(self) -> str:
        return self.other_column or self.name

    def read(self, message: webhook_config_pb2.WebhookConfig) -> Any:
        """Return the column value of a message."""
        if message.DESCRIPTOR.fields_by_name[self.name].has_presence and not message.HasField(
            self.name  # type: ignore[arg-type]
        ):
            return self.default
        return self.to_column(getattr(message, self.name))

    def write(self, row: WebhookConfig) -> Any:
        """Return the protobuf value of a row. None leaves the field unset."""
        value = getattr(row, self.column)
        return None if value is None else self.to_message(value)


#: `check_draft` checks `url` and `events`, because their checks need more than the draft.
FIELDS = {
    field.name: field
    for field in (
        Field("url"),
        Field("events", to_column=list),
        Field("description", lambda path, draft: description_violations(path, draft.description)),
        Field("active", default=True),
        Field(
            "retry_schedule", _schedule_violations, _seconds, _durations, "retry_schedule_seconds"
        ),
        Field("headers", lambda path, draft: header_violations(path, draft.headers), dict),
        Field("header_prefix", _prefix_violations),
        Field("timeout", _timeout_violations, seconds_of, duration_of, "timeout_seconds"),
        Field("rate_limit", _rate_violations),
        Field("max_in_flight", _in_flight_violations),
        Field("ordered"),
    )
}


def webhook_draft(
    message: webhook_config_pb2.WebhookConfig,
    fields: Collection[str] = FIELDS.keys(),
    current: WebhookConfig | None = None,
) -> WebhookConfig:
    """Return a draft with the named fields of the message. The others are those of `current`."""
    return WebhookConfig(
        **{
            field.column: field.read(message) if name in fields else getattr(current, field.column)
            for name, field in FIELDS.items()
        }
    )


def check_draft(
    draft: WebhookConfig,
    fields: Collection[str],
    policy: UrlPolicy,
    unknown_events: Collection[str] = (),
    deprecated_events: Collection[str] = (),
) -> None:
    """Check the named fields, and bring the URL into its canonical form.

    Raises InvalidArgument with every violation.
    """
    violations = []
    if "url" in fields:
        try:
            draft.url = parse_webhook_url(draft.url, policy).text
        except UrlRefused as refused:
            violations.append(FieldViolation(_path("url"), refused.message, refused.reason))
    if "events" in fields:
        path = _path("events")
        violations += _events_violations(path, draft, unknown_events, deprecated_events)
    # A new header may collide with the present prefix.
    checked = {*fields, "header_prefix"} if "headers" in fields else fields
    for name, field in FIELDS.items():
        if name in checked and field.violations is not None:
            violations += field.violations(_path(name), draft)
    if violations:
        raise InvalidArgument(*violations)


def check_prefix(config: WebhookConfig) -> None:
    """Raise InvalidArgument if the prefix is invalid or collides with a header of the config."""
    if violations := _prefix_violations(_path("header_prefix"), config):
        raise InvalidArgument(*violations)


def _path(name: str) -> str:
    return f"webhook_config.{name}"


def webhook_config_message(row: WebhookConfig) -> webhook_config_pb2.WebhookConfig:
    """Return the config without its secret, for which the message has no field."""
    expires_at = row.previous_secret_expires_at
    # The row keeps a retired secret a moment longer than it signs.
    overlaps = expires_at is not None and expires_at > datetime.now(UTC)
    reason = f"DEACTIVATION_REASON_{(row.deactivation_reason or 'unspecified').upper()}"
    return webhook_config_pb2.WebhookConfig(
        id=format_id("wh", row.id),
        merchant_id=row.merchant_id,
        deactivation_reason=webhook_config_pb2.DeactivationReason.Value(reason),
        consecutive_failures=row.consecutive_failures,
        etag=etag_of(row),
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.updated_at),
        previous_secret_expire_time=timestamp(expires_at) if overlaps else None,
        signature_scheme=webhook_config_pb2.SIGNATURE_SCHEME_ED25519
        if row.public_key
        else webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256,
        public_key=row.public_key or "",
        previous_public_key=(row.previous_public_key or "") if overlaps else "",
        **{name: field.write(row) for name, field in FIELDS.items()},
    )


def etag_of(row: WebhookConfig) -> str:
    """Return a hash of the id and the version, so that an etag fits one config only."""
    digest = hashlib.sha256(b"%b %d" % (row.id.bytes, row.version)).digest()
    return base64.urlsafe_b64encode(digest[:12]).decode()
