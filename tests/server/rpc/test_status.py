"""Conversion of errors to a gRPC status."""

from typing import Any

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from core import errors
from core.errors import FieldViolation, InvalidArgument, NotFound, PostriderError, Unavailable
from server.rpc.status import internal_status, to_domain_error, to_status

#: Clients accept 8 KiB of metadata by default. The difference is for other metadata.
METADATA_BYTES_MAX = 7500

EXAMPLES: tuple[tuple[PostriderError, grpc.StatusCode], ...] = (
    (InvalidArgument.of("f", "is wrong", reason="R"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated("m", reason="R"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied("m", reason="R"), grpc.StatusCode.PERMISSION_DENIED),
    (NotFound("m", reason="R"), grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists("m", reason="R"), grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition("m", reason="R"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.QuotaExceeded("m", reason="R", subject="s"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Aborted("m", reason="R"), grpc.StatusCode.ABORTED),
    (Unavailable("m", reason="R"), grpc.StatusCode.UNAVAILABLE),
    (errors.ConfigurationError("m"), grpc.StatusCode.INTERNAL),
)


def detail(status: Any, kind: type[Any]) -> Any:
    [packed] = [packed for packed in status.details if packed.Is(kind.DESCRIPTOR)]
    message = kind()
    packed.Unpack(message)
    return message


def test_each_error_class_has_a_code_and_a_reason() -> None:
    assert set(PostriderError.__subclasses__()) == {type(error) for error, _ in EXAMPLES}
    for error, code in EXAMPLES:
        status = to_status(error)
        assert status.code == code.value[0]
        assert status.message == error.message
        info = detail(status, error_details_pb2.ErrorInfo)
        assert (info.reason, info.domain) == (error.reason, "postrider")


def test_metadata_is_in_the_error_info() -> None:
    status = to_status(NotFound("m", reason="R", metadata={"scope": "x"}))
    assert detail(status, error_details_pb2.ErrorInfo).metadata == {"scope": "x"}


@pytest.mark.parametrize(
    ("error", "milliseconds"),
    [
        (Unavailable("m", reason="R", retry_after_seconds=2.5), 2500),
        (errors.QuotaExceeded("m", reason="R", subject="s", retry_after_seconds=0.0001), 1),
    ],
)
def test_retry_delay_is_rounded_up_to_milliseconds(
    error: PostriderError, milliseconds: int
) -> None:
    info = detail(to_status(error), error_details_pb2.RetryInfo)
    assert info.retry_delay.ToMilliseconds() == milliseconds


def test_quota_failure_names_its_subject() -> None:
    status = to_status(errors.QuotaExceeded("m", reason="R", subject="s"))
    assert detail(status, error_details_pb2.QuotaFailure).violations[0].subject == "s"
    assert not any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details)


@pytest.mark.parametrize("letter", ["x", "漢", "\U0001f600"])
def test_status_fits_into_the_metadata_limit(letter: str) -> None:
    violations = [FieldViolation(f"f[{n}]", letter * 100, "R") for n in range(1000)]
    status = to_status(InvalidArgument(*violations))
    # gRPC sends the message percent-encoded and the whole status in base64.
    encoded = 3 * len(status.message.encode()) + status.ByteSize() * 4 // 3
    assert encoded < METADATA_BYTES_MAX
    shown = detail(status, error_details_pb2.BadRequest).field_violations
    assert shown[0].field == "f[0]"
    assert shown[0].description == letter * 100
    assert status.message.startswith("f[0]: ")
    assert status.message.endswith("…")


def test_internal_status_has_only_a_reference() -> None:
    assert to_domain_error(ValueError("secret")) is None
    status = internal_status("abc123")
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "abc123" in status.message
    assert detail(status, error_details_pb2.ErrorInfo).metadata == {"reference": "abc123"}


def wrapped(error: Exception) -> DBAPIError:
    """An error of the driver as SQLAlchemy raises it."""
    adapted = Exception("adapted")
    adapted.__cause__ = error
    return DBAPIError("SELECT 1", None, adapted)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.ConnectionDoesNotExistError(),
        asyncpg.InterfaceError("closed"),
        asyncpg.AdminShutdownError(),
        asyncpg.CannotConnectNowError(),
        asyncpg.TooManyConnectionsError(),
        asyncpg.ReadOnlySQLTransactionError(),
        asyncpg.DeadlockDetectedError(),
        asyncpg.QueryCanceledError(),
        PoolTimeoutError(),
    ],
)
def test_lost_database_is_unavailable_with_both_drivers(error: Exception) -> None:
    for seen in (error, wrapped(error)):
        away = to_domain_error(seen)
        assert isinstance(away, Unavailable)
        assert away.reason == "DATABASE_UNAVAILABLE"


@pytest.mark.parametrize("error", [asyncpg.UndefinedTableError(), asyncpg.CheckViolationError()])
def test_invalid_statement_is_a_bug(error: Exception) -> None:
    assert to_domain_error(error) is None
    assert to_domain_error(wrapped(error)) is None
