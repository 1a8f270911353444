"""Reports each finished RPC: a log line, metrics and, with tracing on, a span."""

from collections.abc import Mapping
from time import perf_counter
from zlib import crc32

import grpc
import structlog

from core.logs import SuccessSampling
from core.tracing import Span, SpanKind, Tracer
from server.metrics import ServerMetrics
from server.rpc.call import RpcCall

#: Codes that mark a server span as failed, by the conventions of OpenTelemetry.
_SERVER_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

#: Probes and reflection get no spans.
_TRACED_PREFIX = "/postrider."

log = structlog.get_logger()


class RpcReports:
    """The reports of one server."""

    def __init__(
        self,
        metrics: ServerMetrics,
        sampling: SuccessSampling,
        tracer: Tracer | None = None,
    ):
        self._metrics = metrics
        self._sampling = sampling
        self._tracer = tracer

    def begin(self, call: RpcCall) -> None:
        """Start the span of a call."""
        if self._tracer is None:
            return
        if call.method.startswith(_TRACED_PREFIX) and self._metrics.knows(call.method):
            # Only known methods, so that a caller cannot choose the name of a span.
            name = call.method.lstrip("/")
            call.span = self._tracer.start(name, SpanKind.SERVER, parent=call.trace_parent)
            call.trace_parent = call.span.trace_parent

    def end(self, call: RpcCall, code: str, *, reason: str | None = None, **fields: str) -> None:
        """Write the report. `reason` is the reason of an error."""
        seconds = perf_counter() - call.began
        self._metrics.rpc_ended(call.method, code, seconds)
        if call.span is not None:
            _end(call.span, call, code, error=reason or code)
        sampling_fields: Mapping[str, float] = {}
        if code == "OK" and seconds < self._sampling.slow_seconds:
            if not self._sampling.selects(crc32(call.request_id.encode())):
                return
            sampling_fields = self._sampling.log_fields
        caller = call.caller
        log.info(
            "rpc",
            method=call.method,
            code=code,
            reason=reason,
            duration_ms=round(seconds * 1000, 3),
            request_id=call.request_id,
            trace_id=call.trace_parent.trace_id if call.trace_parent else None,
            subject=caller.subject if caller else None,
            merchant_id=caller.merchant_id if caller else None,
            **fields,
            **sampling_fields,
        )


def _end(span: Span, call: RpcCall, code: str, *, error: str) -> None:
    service, _, name = call.method.lstrip("/").rpartition("/")
    attributes: dict[str, str | int | float] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": name,
        "rpc.grpc.status_code": grpc.StatusCode[code].value[0],
        "postrider.request_id": call.request_id,
    }
    if call.caller is not None and call.caller.merchant_id is not None:
        attributes["postrider.merchant_id"] = call.caller.merchant_id
    if code != "OK":
        attributes["error.type"] = error
    span.end(attributes, code if code in _SERVER_ERRORS else None)
