"""The only place where a row becomes a message or a message a domain value.

Columns are `*_at`, message fields `*_time`; ids get their prefixes here.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from core.errors import InvalidArgument, NotFound
from core.ids import IdKind, format_id, parse_id
from core.lifecycle import AttemptResult, DeactivationReason, DeliveryState, Outcome
from core.models import AuditEntry, EventType, WebhookConfig
from core.queue import FailedFilter, Finding
from core.signing import SignatureScheme
from postrider.v1 import (
    admin_service_pb2,
    delivery_pb2,
    delivery_service_pb2,
    event_pb2,
    webhook_config_pb2,
    webhook_config_service_pb2,
)
from server.event_history import EventRow
from server.event_type_register import EventTypeDraft
from server.event_types import is_event_type_name
from server.history import AttemptRow, DeliveryRow
from server.ingest import EventDraft, PublishedEvent, is_merchant_id
from server.ping import is_reachable
from server.queue_status import Standing
from server.registration import WebhookDraft
from server.tail import Recorded

_SCHEMES: Mapping[int, SignatureScheme | None] = {
    webhook_config_pb2.SIGNATURE_SCHEME_UNSPECIFIED: None,
    webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256: SignatureScheme.HMAC_SHA256,
    webhook_config_pb2.SIGNATURE_SCHEME_ED25519: SignatureScheme.ED25519,
}
_NAMES: Mapping[IdKind, str] = {"wh": "webhook config", "evt": "event", "dlv": "delivery"}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


def id_of(kind: IdKind, text: str) -> UUID:
    """The UUID in an id that a call is about; a text that is none is simply unknown."""
    value = parse_id(kind, text)
    if value is None:
        raise not_found(kind, text)
    return value


def optional_id_of(kind: IdKind, text: str, field: str) -> UUID | None:
    """The UUID in a filter; None when it is empty, InvalidArgument when it is not an id."""
    value = parse_id(kind, text) if text else None
    if text and value is None:
        raise InvalidArgument.of(
            field, f"is not the id of a {_NAMES[kind]} ({kind}_ and 32 digits)", reason="ID_INVALID"
        )
    return value


def not_found(kind: IdKind, text: str) -> NotFound:
    """The same words for an id that is unknown, malformed, deleted or another merchant's."""
    return NotFound(
        f"there is no {_NAMES[kind]} with the id {text[:80]!r}",
        reason=f"{_NAMES[kind].upper().replace(' ', '_')}_NOT_FOUND",
    )


def webhook_draft(message: webhook_config_pb2.WebhookConfig) -> WebhookDraft:
    return WebhookDraft(
        url=message.url,
        events=list(message.events),
        description=message.description,
        active=message.active if message.HasField("active") else True,
        retry_schedule_seconds=[_seconds(duration) for duration in message.retry_schedule],
        headers=dict(message.headers),
        timeout_seconds=_seconds(message.timeout) if message.HasField("timeout") else None,
        rate_limit=message.rate_limit,
        max_in_flight=message.max_in_flight,
        ordered=message.ordered,
        header_prefix=message.header_prefix,
    )


def signature_scheme(value: int, field: str) -> SignatureScheme | None:
    """The scheme that is asked for; None when none is, InvalidArgument when there is no such."""
    if value not in _SCHEMES:
        raise InvalidArgument.of(
            field,
            "is none of SIGNATURE_SCHEME_HMAC_SHA256 and SIGNATURE_SCHEME_ED25519",
            reason="SIGNATURE_SCHEME_INVALID",
        )
    return _SCHEMES[value]


def overlap_seconds(request: webhook_config_service_pb2.RotateSecretRequest) -> float:
    """How long the present secret keeps signing; a day when the caller does not say."""
    return _seconds(request.overlap) if request.HasField("overlap") else 86_400.0


def webhook_config_message(row: WebhookConfig) -> webhook_config_pb2.WebhookConfig:
    timeout, expires_at = row.timeout_seconds, row.previous_secret_expires_at
    # The row keeps the secret before for a moment longer than it signs.
    overlaps = expires_at is not None and expires_at > datetime.now(UTC)
    reason = f"DEACTIVATION_REASON_{(row.deactivation_reason or 'unspecified').upper()}"
    return webhook_config_pb2.WebhookConfig(
        id=format_id("wh", row.id),
        merchant_id=row.merchant_id,
        url=row.url,
        events=row.events,
        description=row.description,
        active=row.active,
        deactivation_reason=webhook_config_pb2.DeactivationReason.Value(reason),
        consecutive_failures=row.consecutive_failures,
        retry_schedule=[_duration(seconds) for seconds in row.retry_schedule_seconds],
        etag=etag_of(row),
        create_time=_timestamp(row.created_at),
        update_time=_timestamp(row.updated_at),
        headers=row.headers,
        timeout=None if timeout is None else _duration(timeout),
        rate_limit=row.rate_limit,
        max_in_flight=row.max_in_flight,
        ordered=row.ordered,
        previous_secret_expire_time=_timestamp(expires_at) if overlaps else None,
        signature_scheme=webhook_config_pb2.SIGNATURE_SCHEME_ED25519
        if row.public_key
        else webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256,
        public_key=row.public_key or "",
        previous_public_key=(row.previous_public_key or "") if overlaps else "",
        header_prefix=row.header_prefix,
    )


def etag_of(row: WebhookConfig) -> str:
    return f"v{row.version}"


def event_type_message(row: EventType) -> webhook_config_pb2.EventType:
    return webhook_config_pb2.EventType(
        name=row.name,
        description=row.description,
        create_time=_timestamp(row.created_at),
        json_schema=row.json_schema,
        enforce_schema=row.enforce_schema,
        example=row.example,
        deprecated=row.deprecated,
    )


def event_type_draft(message: webhook_config_pb2.EventType) -> EventTypeDraft:
    return EventTypeDraft(
        name=message.name,
        description=message.description,
        json_schema=message.json_schema,
        enforce_schema=message.enforce_schema,
        example=message.example,
        deprecated=message.deprecated,
    )


def audit_entry_message(row: AuditEntry) -> admin_service_pb2.AuditEntry:
    return admin_service_pb2.AuditEntry(
        create_time=_timestamp(row.created_at),
        actor=row.actor,
        action=row.action,
        resource=row.resource,
        merchant_id=row.merchant_id or "",
        result=row.result,
        changed_fields=row.changed_fields,
        comment=row.comment,
        request_id=row.request_id,
        caller_address=row.caller_address,
        user_agent=row.user_agent,
    )


def queue_status_message(standing: Standing) -> admin_service_pb2.QueueStatus:
    return admin_service_pb2.QueueStatus(
        webhook_id=format_id("wh", standing.webhook_id) if standing.webhook_id else "",
        merchant_id=standing.merchant_id or "",
        ready=standing.ready,
        parked=standing.parked,
        leased=standing.leased,
        blocked=standing.blocked,
        oldest_due_age=_duration(standing.oldest_due_age_seconds),
        breaker_open_until=_timestamp(standing.breaker_open_until)
        if standing.breaker_open_until
        else None,
    )


def invariant_budget(request: admin_service_pb2.CheckInvariantsRequest) -> float:
    """Seconds to go on looking; InvalidArgument for more or less than a call may take."""
    if not request.HasField("budget"):
        return 10.0
    seconds = _seconds(request.budget)
    if not 1 <= seconds <= 60:
        raise InvalidArgument.of("budget", "must be 1 s to 60 s", reason="BUDGET_INVALID")
    return seconds


def invariant_check_message(finding: Finding) -> admin_service_pb2.InvariantCheck:
    return admin_service_pb2.InvariantCheck(
        name=finding.invariant.name,
        description=finding.invariant.says,
        examined=finding.examined,
        broken=len(finding.broken),
        examples=[format_id(finding.invariant.ids, id_) for id_ in finding.broken[:10]],
        complete=finding.complete,
    )


def ping_message(result: AttemptResult) -> webhook_config_service_pb2.PingWebhookConfigResponse:
    return webhook_config_service_pb2.PingWebhookConfigResponse(
        reachable=is_reachable(result),
        status_code=result.status_code or 0,
        detail=result.detail,
        duration=_duration(result.duration_us / 1e6),
    )


def event_draft(message: event_pb2.EventInput) -> EventDraft:
    match message.WhichOneof("body"):
        case "payload":
            payload: bytes | None = message.payload
        case "payload_text":
            payload = message.payload_text.encode()
        case _:
            payload = None
    return EventDraft(
        merchant_id=message.merchant_id,
        type=message.type,
        content_type=message.content_type,
        payload=payload,
        idempotency_key=message.idempotency_key,
        not_before=_not_before(message),
        ordering_key=message.ordering_key,
    )


def _not_before(message: event_pb2.EventInput) -> datetime | None:
    if not message.HasField("not_before"):
        return None
    try:
        return message.not_before.ToDatetime(UTC)
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)


def event_message(event: PublishedEvent | EventRow) -> event_pb2.Event:
    message = event_pb2.Event()
    fill_event(message, event)
    return message


def fill_event(message: event_pb2.Event, event: PublishedEvent | EventRow) -> None:
    """Set the fields of an empty message: in its place, which costs half of making it to be copied.

    Every accepted event is answered so.
    """
    message.id = format_id("evt", event.id)
    message.merchant_id = event.merchant_id
    message.type = event.type
    _fill_time(message.create_time, event.created_at)
    message.delivery_count = event.delivery_count
    if event.not_before is not None:
        _fill_time(message.not_before, event.not_before)
    if event.ordering_key:
        message.ordering_key = event.ordering_key


def delivery_state_filter(
    state: delivery_pb2.DeliveryState.ValueType,
) -> DeliveryState | None:
    """The state to filter by; None for all."""
    if state == delivery_pb2.DELIVERY_STATE_UNSPECIFIED:
        return None
    try:
        name = delivery_pb2.DeliveryState.Name(state)
    except ValueError:
        raise InvalidArgument.of(
            "state", "is not a delivery state this server knows", reason="STATE_UNKNOWN"
        ) from None
    return DeliveryState(name.removeprefix("DELIVERY_STATE_").lower())


def event_type_filter(text: str) -> str | None:
    """The event type to filter by; None for all."""
    if text and not is_event_type_name(text):
        raise InvalidArgument.of(
            "event_type",
            "is not the name of an event type, such as payment.succeeded",
            reason="EVENT_TYPE_NAME_INVALID",
        )
    return text or None


def failed_filter(
    request: admin_service_pb2.RedeliverDeliveriesRequest, now: datetime
) -> FailedFilter:
    """Which failed deliveries to send again; the range of times has both ends, and has passed."""
    start_at, end_at = time_range(request)
    if start_at is None or end_at is None or end_at > now:
        raise InvalidArgument.of(
            "start_time" if start_at is None else "end_time",
            "is required; send both ends of a time that has passed",
            reason="TIME_RANGE_OPEN",
        )
    if request.merchant_id:
        check_merchant_id(request.merchant_id)
    return FailedFilter(
        start_at,
        end_at,
        merchant_id=request.merchant_id or None,
        webhook_id=optional_id_of("wh", request.webhook_id, "webhook_id"),
        outcomes=[_outcome(outcome) for outcome in request.outcomes],
    )


def _outcome(value: delivery_pb2.Outcome.ValueType) -> Outcome:
    try:
        return Outcome(delivery_pb2.Outcome.Name(value).removeprefix("OUTCOME_").lower())
    except ValueError:
        raise InvalidArgument.of(
            "outcomes", "holds an outcome this server does not know", reason="OUTCOME_UNKNOWN"
        ) from None


def deactivation_reason_filter(
    value: webhook_config_pb2.DeactivationReason.ValueType,
) -> DeactivationReason | None:
    """The reason to filter by; None for all."""
    if value == webhook_config_pb2.DEACTIVATION_REASON_UNSPECIFIED:
        return None
    try:
        name = webhook_config_pb2.DeactivationReason.Name(value)
    except ValueError:
        raise InvalidArgument.of(
            "deactivation_reason",
            "is not a reason this server knows",
            reason="DEACTIVATION_REASON_UNKNOWN",
        ) from None
    return DeactivationReason(name.removeprefix("DEACTIVATION_REASON_").lower())


def check_merchant_id(merchant_id: str) -> None:
    """InvalidArgument when no merchant can have this id."""
    if not is_merchant_id(merchant_id):
        raise InvalidArgument.of(
            "merchant_id", "must be 1 to 64 of A-Z a-z 0-9 _ -", reason="MERCHANT_ID_INVALID"
        )


def time_range(request: Message) -> tuple[datetime | None, datetime | None]:
    """start_time and end_time, each None when unset; refused when nothing can lie between them."""
    start_at = time_filter(request, "start_time")
    end_at = time_filter(request, "end_time")
    if start_at is not None and end_at is not None and start_at >= end_at:
        raise InvalidArgument.of(
            "end_time", "must be later than start_time", reason="TIME_RANGE_EMPTY"
        )
    return start_at, end_at


def delivery_message(row: DeliveryRow, attempts: Iterable[AttemptRow]) -> delivery_pb2.Delivery:
    waits = row.state in (DeliveryState.READY, DeliveryState.LEASED)
    return delivery_pb2.Delivery(
        id=format_id("dlv", row.id),
        webhook_id=format_id("wh", row.webhook_id),
        event_id=format_id("evt", row.event_id),
        event_type=row.event_type,
        state=delivery_pb2.DeliveryState.Value(f"DELIVERY_STATE_{row.state.upper()}"),
        attempt_count=row.attempt_count,
        next_attempt_time=_timestamp(row.due_at) if waits else None,
        create_time=_timestamp(row.created_at),
        finish_time=_timestamp(row.finished_at),
        attempts=[_attempt_message(attempt) for attempt in attempts],
        redelivery_of=format_id("dlv", row.redelivery_of) if row.redelivery_of else "",
    )


def watch_message(
    recorded: Recorded | None, resume_token: str
) -> delivery_service_pb2.WatchDeliveriesResponse:
    return delivery_service_pb2.WatchDeliveriesResponse(
        delivery=delivery_message(recorded.delivery, [recorded.attempt]) if recorded else None,
        resume_token=resume_token,
    )


def delivery_messages(
    rows: Sequence[DeliveryRow], attempts: Mapping[UUID, Sequence[AttemptRow]]
) -> list[delivery_pb2.Delivery]:
    return [delivery_message(row, attempts.get(row.id, ())) for row in rows]


def _attempt_message(row: AttemptRow) -> delivery_pb2.Attempt:
    return delivery_pb2.Attempt(
        number=row.number,
        outcome=delivery_pb2.Outcome.Value(f"OUTCOME_{row.outcome.upper()}"),
        status_code=row.status_code or 0,
        detail=row.detail,
        start_time=_timestamp(row.started_at),
        duration=_duration(row.duration_us / 1e6),
        dns_duration=_phase(row.dns_us),
        connect_duration=_phase(row.connect_us),
        first_byte_duration=_phase(row.first_byte_us),
        remote_address=row.remote_address or "",
        response_excerpt=row.response_excerpt,
    )


def _phase(microseconds: int | None) -> Duration | None:
    return None if microseconds is None else _duration(microseconds / 1e6)


def time_filter(request: Message, field: str) -> datetime | None:
    """The time in a filter; None when it is unset, InvalidArgument when no id can be of it."""
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


def _timestamp(moment: datetime | None) -> Any:
    if moment is None:
        return None
    message = Timestamp()
    _fill_time(message, moment)
    return message


def _fill_time(message: Timestamp, moment: datetime) -> None:
    # FromDatetime does the same ten times as slowly.
    since = moment - _EPOCH
    message.seconds = since.days * 86_400 + since.seconds
    message.nanos = since.microseconds * 1000


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1_000_000) * 1000)
    return message
