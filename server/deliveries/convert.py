"""Converts deliveries and attempts to messages."""

from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID

from google.protobuf.duration_pb2 import Duration

from core.errors import InvalidArgument
from core.ids import format_id
from core.lifecycle import DeliveryState
from postrider.v1 import delivery_pb2, delivery_service_pb2
from server.deliveries.store import DeliveryRow, RecordedAttempt
from server.deliveries.tail import Recorded
from server.rpc.times import duration_of, timestamp


def delivery_message(
    row: DeliveryRow, attempts: Iterable[RecordedAttempt]
) -> delivery_pb2.Delivery:
    waits = row.state in (DeliveryState.READY, DeliveryState.LEASED)
    return delivery_pb2.Delivery(
        id=format_id("dlv", row.id),
        webhook_id=format_id("wh", row.webhook_id),
        event_id=format_id("evt", row.event_id),
        event_type=row.event_type,
        state=delivery_pb2.DeliveryState.Value(f"DELIVERY_STATE_{row.state.upper()}"),
        attempt_count=row.attempt_count,
        next_attempt_time=timestamp(row.due_at) if waits else None,
        create_time=timestamp(row.created_at),
        finish_time=timestamp(row.finished_at),
        # Attempts are read after the delivery, so later ones are left out.
        attempts=[_attempt_message(a) for a in attempts if a.number <= row.attempt_count],
        redelivery_of=format_id("dlv", row.redelivery_of) if row.redelivery_of else "",
    )


def delivery_messages(
    rows: Sequence[DeliveryRow], attempts: Mapping[UUID, Sequence[RecordedAttempt]]
) -> list[delivery_pb2.Delivery]:
    return [delivery_message(row, attempts.get(row.id, ())) for row in rows]


def watch_message(
    recorded: Recorded | None, resume_token: str
) -> delivery_service_pb2.WatchDeliveriesResponse:
    return delivery_service_pb2.WatchDeliveriesResponse(
        delivery=delivery_message(recorded.delivery, [recorded.attempt]) if recorded else None,
        resume_token=resume_token,
    )


def _attempt_message(attempt: RecordedAttempt) -> delivery_pb2.Attempt:
    result = attempt.result
    return delivery_pb2.Attempt(
        number=attempt.number,
        outcome=delivery_pb2.Outcome.Value(f"OUTCOME_{result.outcome.upper()}"),
        status_code=result.status_code or 0,
        detail=result.detail,
        start_time=timestamp(attempt.started_at),
        duration=duration_of(result.duration_us / 1e6),
        dns_duration=_phase(result.dns_us),
        connect_duration=_phase(result.connect_us),
        tls_duration=_phase(result.tls_us),
        first_byte_duration=_phase(result.first_byte_us),
        remote_address=result.remote_address or "",
        response_excerpt=result.response_excerpt,
    )


def _phase(microseconds: int | None) -> Duration | None:
    return None if microseconds is None else duration_of(microseconds / 1e6)


def delivery_state_filter(
    state: delivery_pb2.DeliveryState.ValueType,
) -> DeliveryState | None:
    """Return the state to filter by, or None for all."""
    if state == delivery_pb2.DELIVERY_STATE_UNSPECIFIED:
        return None
    try:
        name = delivery_pb2.DeliveryState.Name(state)
    except ValueError:
        raise InvalidArgument.of(
            "state", "is not a delivery state that this server knows", reason="STATE_UNKNOWN"
        ) from None
    return DeliveryState(name.removeprefix("DELIVERY_STATE_").lower())
