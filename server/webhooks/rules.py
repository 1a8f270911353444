"""What a webhook config may be: the rules for its fields, apart from how they arrive (pure)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import FieldViolation, InvalidArgument
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url
from server.event_types.cache import deprecated_event_type, unknown_subscription
from server.webhooks.header_rules import header_violations, prefix_violations

UPDATABLE_FIELDS = (
    *("url", "events", "description", "active", "retry_schedule"),
    *("headers", "timeout", "rate_limit", "max_in_flight", "ordered", "header_prefix"),
)

_EVENTS_MAX = 100
_DESCRIPTION_MAX = 500
_RETRIES_MAX = 20
_RETRY_SECONDS = (1.0, 86_400.0)
_TIMEOUT_SECONDS = (1.0, 30.0)
#: Below the first, a webhook would wait for a quarter of an hour: that is a pause, not a rate.
_RATE_LIMITS = (0.001, 10_000.0)
_IN_FLIGHT_MAX = 1000
_OVERLAP_SECONDS_MAX = 7 * 86_400


@dataclass(frozen=True, slots=True)
class WebhookDraft:
    """The fields a merchant sets, as they came; which of them count is the caller's to say."""

    url: str
    events: Sequence[str]
    description: str
    active: bool
    retry_schedule_seconds: Sequence[float]
    #: Values may be credentials of the receiver.
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_seconds: float | None = None
    rate_limit: float = 0
    max_in_flight: int = 0
    ordered: bool = False
    header_prefix: str = ""


def check_overlap(seconds: float) -> None:
    """InvalidArgument unless a retired secret may sign for so long."""
    if not 0 <= seconds <= _OVERLAP_SECONDS_MAX:
        raise InvalidArgument.of(
            "overlap", f"must be 0 to {_OVERLAP_SECONDS_MAX} seconds", reason="OVERLAP_INVALID"
        )


def check_draft(
    draft: WebhookDraft,
    fields: Collection[str],
    policy: UrlPolicy,
    unknown_events: Collection[str],
    deprecated_events: Collection[str] = (),
) -> str:
    """The URL in canonical form; InvalidArgument with every violation of the given fields."""
    url, violations = draft.url, []
    if "url" in fields:
        try:
            url = parse_webhook_url(draft.url, policy).text
        except UrlRefused as refused:
            violations.append(FieldViolation(_path("url"), refused.message, refused.reason))
    if "events" in fields:
        violations += _events_violations(draft.events, unknown_events, deprecated_events)
    if "description" in fields:
        violations += description_violations(_path("description"), draft.description)
    if "retry_schedule" in fields:
        violations += _schedule_violations(draft.retry_schedule_seconds)
    if "headers" in fields:
        violations += header_violations(_path("headers"), draft.headers)
    if "headers" in fields or "header_prefix" in fields:
        path = _path("header_prefix")
        violations += prefix_violations(path, draft.header_prefix, draft.headers)
    violations += _limit_violations(draft, fields)
    if violations:
        raise InvalidArgument(*violations)
    return url


def check_prefix(header_prefix: str, headers: Mapping[str, str]) -> None:
    """InvalidArgument when the prefix makes a header that is there already, or must not be."""
    if violations := prefix_violations(_path("header_prefix"), header_prefix, headers):
        raise InvalidArgument(*violations)


def _events_violations(
    events: Sequence[str], unknown_events: Collection[str], deprecated_events: Collection[str]
) -> list[FieldViolation]:
    if not 1 <= len(events) <= _EVENTS_MAX:
        description = f"must name 1 to {_EVENTS_MAX} event types"
        return [FieldViolation(_path("events"), description, "EVENTS_COUNT")]
    if len(set(events)) < len(events):
        return [FieldViolation(_path("events"), "names a type twice", "EVENTS_REPEATED")]
    violations = []
    for index, name in enumerate(events):
        if name in unknown_events:
            violations.append(unknown_subscription(f"{_path('events')}[{index}]", name))
        elif name in deprecated_events:
            violations.append(deprecated_event_type(f"{_path('events')}[{index}]", name))
    return violations


def description_violations(field: str, description: str) -> list[FieldViolation]:
    """At most one: a description is text for a person's list, on one line and in one direction."""
    if len(description) <= _DESCRIPTION_MAX and description.isprintable():
        return []
    text = f"must be at most {_DESCRIPTION_MAX} printable characters"
    return [FieldViolation(field, text, "DESCRIPTION_INVALID")]


def _schedule_violations(schedule: Sequence[float]) -> list[FieldViolation]:
    if len(schedule) > _RETRIES_MAX:
        text = f"must have at most {_RETRIES_MAX} waits"
        return [FieldViolation(_path("retry_schedule"), text, "RETRY_SCHEDULE_TOO_LONG")]
    shortest, longest = _RETRY_SECONDS
    return [
        FieldViolation(
            f"{_path('retry_schedule')}[{index}]",
            f"must be {shortest:.0f} to {longest:.0f} seconds",
            "RETRY_WAIT_INVALID",
        )
        for index, seconds in enumerate(schedule)
        if not shortest <= seconds <= longest
    ]


def _limit_violations(draft: WebhookDraft, fields: Collection[str]) -> list[FieldViolation]:
    violations = []
    shortest, longest = _TIMEOUT_SECONDS
    timeout = draft.timeout_seconds
    if "timeout" in fields and timeout is not None and not shortest <= timeout <= longest:
        text = f"must be {shortest:.0f} to {longest:.0f} seconds, or unset"
        violations.append(FieldViolation(_path("timeout"), text, "TIMEOUT_INVALID"))
    slowest, fastest = _RATE_LIMITS
    rate = draft.rate_limit
    if "rate_limit" in fields and rate != 0 and not slowest <= rate <= fastest:
        text = f"must be {slowest} to {fastest:.0f} webhooks a second, or 0 for no limit"
        violations.append(FieldViolation(_path("rate_limit"), text, "RATE_LIMIT_INVALID"))
    if "max_in_flight" in fields and not 0 <= draft.max_in_flight <= _IN_FLIGHT_MAX:
        text = f"must be 1 to {_IN_FLIGHT_MAX}, or 0 for the operator's cap"
        violations.append(FieldViolation(_path("max_in_flight"), text, "MAX_IN_FLIGHT_INVALID"))
    return violations


def _path(name: str) -> str:
    return f"webhook_config.{name}"
