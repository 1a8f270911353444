"""What is told of an RPC when it is over: a line, its count, and a span where traces are on."""

from collections.abc import Mapping
from time import perf_counter
from zlib import crc32

import grpc
import structlog

from core.logs import SuccessSampling
from core.tracing import Span, SpanKind, Tracer
from server.metrics import ServerMetrics
from server.rpc.call import RpcCall

#: Our faults, not the caller's (the conventions of OpenTelemetry for spans of a server).
_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

#: Probes and reflection are calls, too, and nobody's trace.
_OURS = "/postrider."

log = structlog.get_logger()


class RpcReports:
    """Those of one server."""

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
        """It may have a span from here on."""
        if self._tracer is None:
            return
        if call.method.startswith(_OURS) and self._metrics.knows(call.method):
            # No span has a name of a caller's choice.
            name = call.method.lstrip("/")
            call.span = self._tracer.start(name, SpanKind.SERVER, parent=call.trace_parent)
            call.trace_parent = call.span.trace_parent

    def end(self, call: RpcCall, code: str, *, reason: str | None = None, **fields: str) -> None:
        """Tell of the call; `reason` is that of its error."""
        seconds = perf_counter() - call.began
        self._metrics.rpc_ended(call.method, code, seconds)
        if call.span is not None:
            _end(call.span, call, code, error=reason or code)
        drawn: Mapping[str, float] = {}
        if code == "OK" and seconds < self._sampling.slow_seconds:
            if not self._sampling.selects(crc32(call.request_id.encode())):
                return
            drawn = self._sampling.log_fields
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
            **drawn,
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
    span.end(attributes, code if code in _FAULTS else None)
