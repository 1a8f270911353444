"""Converts audit entries, queue status, invariants and redelivery filters of AdminService."""

from datetime import datetime

from core.errors import InvalidArgument
from core.ids import format_id
from core.lifecycle import DeactivationReason, Outcome
from core.models import AuditEntry
from core.queue import FailedFilter, Finding
from postrider.v1 import admin_service_pb2, delivery_pb2, webhook_config_pb2
from server.admin.queue_status import QueueStatus
from server.rpc.ids import check_merchant_id, optional_id_of
from server.rpc.times import duration_of, seconds_of, time_range, timestamp


def audit_entry_message(row: AuditEntry) -> admin_service_pb2.AuditEntry:
    return admin_service_pb2.AuditEntry(
        create_time=timestamp(row.created_at),
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


def deactivation_reason_filter(
    value: webhook_config_pb2.DeactivationReason.ValueType,
) -> DeactivationReason | None:
    """Return the reason to filter by, or None for all. Raises InvalidArgument."""
    if value == webhook_config_pb2.DEACTIVATION_REASON_UNSPECIFIED:
        return None
    try:
        name = webhook_config_pb2.DeactivationReason.Name(value)
    except ValueError:
        raise InvalidArgument.of(
            "deactivation_reason",
            "is not a reason that this server knows",
            reason="DEACTIVATION_REASON_UNKNOWN",
        ) from None
    return DeactivationReason(name.removeprefix("DEACTIVATION_REASON_").lower())


def queue_status_message(status: QueueStatus) -> admin_service_pb2.QueueStatus:
    return admin_service_pb2.QueueStatus(
        webhook_id=format_id("wh", status.webhook_id) if status.webhook_id else "",
        merchant_id=status.merchant_id or "",
        ready=status.ready,
        parked=status.parked,
        leased=status.leased,
        blocked=status.blocked,
        oldest_due_age=duration_of(status.oldest_due_age_seconds),
        breaker_open_until=timestamp(status.breaker_open_until)
        if status.breaker_open_until
        else None,
    )


def invariant_budget(request: admin_service_pb2.CheckInvariantsRequest) -> float:
    """Return the time limit in seconds. Raises InvalidArgument outside 1 s to 60 s."""
    if not request.HasField("budget"):
        return 10.0
    seconds = seconds_of(request.budget)
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


def failed_filter(
    request: admin_service_pb2.RedeliverDeliveriesRequest, now: datetime
) -> FailedFilter:
    """Return the failed deliveries to send again. The time range must be closed and past."""
    start_at, end_at = time_range(request)
    if start_at is None or end_at is None:
        raise InvalidArgument.of(
            "start_time" if start_at is None else "end_time",
            "is required: send both ends of a time range that has passed",
            reason="TIME_RANGE_OPEN",
        )
    if end_at > now:
        raise InvalidArgument.of(
            "end_time",
            f"must have passed; by the server's clock it is {now:%Y-%m-%dT%H:%M:%S.%fZ}",
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
            "outcomes",
            "contains an outcome that this server does not know",
            reason="OUTCOME_UNKNOWN",
        ) from None
