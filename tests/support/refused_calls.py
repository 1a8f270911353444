"""Assertions on refused calls, with the details decoded as a client decodes them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass
class Refusal:
    """The status and details of a refused call, filled in at the end of the `refused` block."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    #: Reasons by field, as BadRequest has them.
    violations: dict[str, str] = field(default_factory=dict)
    descriptions: list[str] = field(default_factory=list)
    quota_subjects: list[str] = field(default_factory=list)
    retry_after_seconds: float | None = None

    def read(self, error: grpc.aio.AioRpcError) -> None:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        self.code, self.message = error.code(), error.details() or ""
        assert status is not None, f"{self.code.name} without details: {self.message}"
        assert status.message == self.message
        info = _unpack(status, error_details_pb2.ErrorInfo)
        assert info is not None
        assert info.domain == "postrider"
        self.reason, self.metadata = info.reason, dict(info.metadata)
        if bad_request := _unpack(status, error_details_pb2.BadRequest):
            self.violations = {v.field: v.reason for v in bad_request.field_violations}
            self.descriptions = [v.description for v in bad_request.field_violations]
        if quota := _unpack(status, error_details_pb2.QuotaFailure):
            self.quota_subjects = [v.subject for v in quota.violations]
        if retry := _unpack(status, error_details_pb2.RetryInfo):
            self.retry_after_seconds = retry.retry_delay.ToNanoseconds() / 1e9


@asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str) -> AsyncIterator[Refusal]:
    """Fails unless the block's call is refused with this code and ErrorInfo reason."""
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield refusal
    refusal.read(caught.value)
    assert (refusal.code, refusal.reason) == (code, reason), refusal.message


async def refusal_of(call: Any) -> Refusal:
    """The refusal of a call, with any code and reason."""
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    refusal.read(caught.value)
    return refusal


def _unpack(status: Any, kind: type[Message]) -> Any:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None
