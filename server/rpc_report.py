"""What is told of an RPC when it is over: a line, its count, and a span where traces are on."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from time import perf_counter
from typing import NamedTuple
from zlib import crc32

import grpc
import structlog

from core.logs import SuccessSampling
from core.tracing import Span, SpanKind, TraceParent, Tracer, trace_parent_in
from server.authentication import current_principal
from server.measures import ServerMeasures
from server.request_id import begin_request, current_request_id

#: Our faults, not the caller's (the conventions of OpenTelemetry for spans of a server).
_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

#: Probes and reflection are calls, too, and nobody's trace.
_OURS = "/postrider."

log = structlog.get_logger()


class PresentRpc(NamedTuple):
    """The RPC under way; `trace_parent` is our span in it, or the caller's where we have none."""

    method: str
    began: float
    trace_parent: TraceParent | None
    span: Span | None


# Set where gRPC asks for a handler, in a task that only this call has.
present_rpc: ContextVar[PresentRpc] = ContextVar("present_rpc")


def trace_parent() -> str | None:
    """What the present RPC leaves with what it stores, as text."""
    rpc = present_rpc.get(None)
    return str(rpc.trace_parent) if rpc is not None and rpc.trace_parent is not None else None


class RpcReports:
    """Those of one server."""

    def __init__(
        self,
        measures: ServerMeasures,
        sampling: SuccessSampling,
        tracer: Tracer | None = None,
    ):
        self._measures = measures
        self._sampling = sampling
        self._tracer = tracer

    def begin(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """From here on the call has its ids."""
        began = perf_counter()
        begin_request(metadata)
        parent, span = trace_parent_in(metadata), None
        if self._tracer is not None and method.startswith(_OURS) and self._measures.knows(method):
            # No span has a name of a caller's choice.
            span = self._tracer.begin(method.lstrip("/"), SpanKind.SERVER, parent=parent)
            parent = span.trace_parent
        present_rpc.set(PresentRpc(method, began, parent, span))

    def end(self, code: str, *, reason: str | None = None, **fields: str) -> None:
        """Tell of the present call; `reason` is that of its error."""
        rpc = present_rpc.get()
        seconds = perf_counter() - rpc.began
        self._measures.rpc_ended(rpc.method, code, seconds)
        if rpc.span is not None:
            _end(rpc.span, rpc.method, code, error=reason or code)
        drawn: Mapping[str, float] = {}
        if code == "OK" and seconds < self._sampling.slow_seconds:
            if not self._sampling.draws(crc32(current_request_id.get().encode())):
                return
            drawn = self._sampling.fields
        caller = current_principal.get(None)
        log.info(
            "rpc",
            method=rpc.method,
            code=code,
            reason=reason,
            duration_ms=round(seconds * 1000, 3),
            request_id=current_request_id.get(),
            trace_id=rpc.trace_parent.trace_id if rpc.trace_parent else None,
            subject=caller.subject if caller else None,
            merchant_id=caller.merchant_id if caller else None,
            **fields,
            **drawn,
        )


def _end(span: Span, method: str, code: str, *, error: str) -> None:
    service, _, name = method.lstrip("/").rpartition("/")
    attributes: dict[str, str | int | float] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": name,
        "rpc.grpc.status_code": grpc.StatusCode[code].value[0],
        "postrider.request_id": current_request_id.get(),
    }
    caller = current_principal.get(None)
    if caller is not None and caller.merchant_id is not None:
        attributes["postrider.merchant_id"] = caller.merchant_id
    if code != "OK":
        attributes["error.type"] = error
    span.end(attributes, code if code in _FAULTS else None)
