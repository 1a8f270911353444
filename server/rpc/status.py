"""Maps each error to a gRPC status. There is no other place that does.

The message is for people and is complete, because command-line clients hide the details.
ErrorInfo.reason and the other details are for programs (google.rpc error model, AIP-193). An error
outside core/errors.py becomes INTERNAL with a reference and no further text.
"""

from collections.abc import Iterable
from math import ceil

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from core.errors import (
    Aborted,
    AlreadyExists,
    ConfigurationError,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PostriderError,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from core.postgres.pool import RETRYABLE_ERRORS

DOMAIN = "postrider"

# gRPC carries the status in metadata, with the message twice. Clients drop metadata above 8 KiB, so
# both are truncated.
_MESSAGE_BYTES_MAX = 1024
_VIOLATIONS_BYTES_MAX = 2048

_CODES: dict[type[PostriderError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Aborted: grpc.StatusCode.ABORTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    # Raised only at start. Callers must not see settings.
    ConfigurationError: grpc.StatusCode.INTERNAL,
}


def to_domain_error(error: BaseException) -> PostriderError | None:
    """Return the domain error for an exception, or None for a bug."""
    if isinstance(error, PostriderError):
        return error
    if isinstance(error, DBAPIError) and error.orig is not None:
        # SQLAlchemy wraps the error of asyncpg twice.
        error = error.orig.__cause__ or error.orig
    if isinstance(error, (*RETRYABLE_ERRORS, PoolTimeoutError)):
        return Unavailable(
            # The commit may have succeeded before the connection failed.
            "the database is not available: send the call again, and events with the same "
            "idempotency keys",
            reason="DATABASE_UNAVAILABLE",
        )
    return None


def to_status(error: PostriderError) -> status_pb2.Status:
    """Return the google.rpc.Status of a domain error, with typed details."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    match error:
        case InvalidArgument():
            details.append(_bad_request(error.violations))
        case QuotaExceeded():
            violation = error_details_pb2.QuotaFailure.Violation(
                subject=error.subject, description=error.message
            )
            details.append(error_details_pb2.QuotaFailure(violations=[violation]))
            if error.retry_after_seconds is not None:
                details.append(_retry_info(error.retry_after_seconds))
        case Unavailable():
            details.append(_retry_info(error.retry_after_seconds))
    return _status(_CODES[type(error)], error.message, details)


def internal_status(reference: str) -> status_pb2.Status:
    """Return the status of a bug, with the reference to quote to the operators."""
    info = error_details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"reference": reference}
    )
    message = f"Postrider failed; the call may be sent again. Quote {reference} to its operators."
    return _status(grpc.StatusCode.INTERNAL, message, [info])


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    # Rounded up, because a call that is too early is refused again.
    delay.FromMilliseconds(ceil(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(violations: Iterable[FieldViolation]) -> error_details_pb2.BadRequest:
    """Return the first violations that fit."""
    details = error_details_pb2.BadRequest()
    for v in violations:
        details.field_violations.add(field=v.field, description=v.description, reason=v.reason)
        if details.ByteSize() > _VIOLATIONS_BYTES_MAX:
            del details.field_violations[-1]
            break
    return details


def _status(code: grpc.StatusCode, message: str, details: list[Message]) -> status_pb2.Status:
    number = code_pb2.Code.Value(code.name)
    text = message.encode()
    if len(text) > _MESSAGE_BYTES_MAX:
        message = text[:_MESSAGE_BYTES_MAX].decode(errors="ignore") + "…"
    status = status_pb2.Status(code=number, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
