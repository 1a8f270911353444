"""Exports spans with OpenTelemetry. Implements the port of `core/tracing`.

A background thread sends spans in batches. Spans that the collector does not accept are dropped, so
no call or attempt waits for it. The standard OTEL_EXPORTER_OTLP_ variables add headers and
certificates; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES describe the process.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from threading import Thread

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.util.types import Attributes

from core.tracing import SpanKind, TraceParent

_CLOSE_SECONDS = 5.0
_KINDS = {SpanKind.SERVER: trace.SpanKind.SERVER, SpanKind.CLIENT: trace.SpanKind.CLIENT}

log = structlog.get_logger()


class OpenTelemetry:
    """A Tracer. `endpoint` is the collector's base URL, as in OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self, endpoint: str, sample_rate: float, service: str):
        self._ids = _Ids()
        names = {"service.name": service, "service.version": version("postrider")}
        self._provider = TracerProvider(
            sampler=ParentBased(_LinkFirst(sample_rate)),
            # Values of the environment win.
            resource=Resource.create(names).merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("postrider")

    def start(
        self,
        name: str,
        kind: SpanKind,
        *,
        parent: TraceParent | None = None,
        link: TraceParent | None = None,
        trace_id: int | None = None,
    ) -> "_Span":
        if parent is None:
            self._ids.next_trace_id = trace_id
        context = Context()
        if parent is not None:
            context = trace.set_span_in_context(trace.NonRecordingSpan(_remote(parent)), context)
        links = [trace.Link(_remote(link))] if link is not None else None
        return _Span(self._tracer.start_span(name, context, _KINDS[kind], links=links))

    def close(self) -> None:
        """Send the remaining spans. Blocks for at most 5 s."""
        # In a thread, because the provider may wait for each of many batches.
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("spans_left_behind")


class _Span:
    __slots__ = ("_span",)

    def __init__(self, span: trace.Span):
        self._span = span

    @property
    def trace_parent(self) -> TraceParent:
        context = self._span.get_span_context()
        return TraceParent(
            trace.format_trace_id(context.trace_id),
            trace.format_span_id(context.span_id),
            context.trace_flags.sampled,
        )

    def end(self, attributes: Mapping[str, str | int | float], error: str | None = None) -> None:
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end()


class _Ids(RandomIdGenerator):
    """Random ids, except for a requested trace id."""

    next_trace_id: int | None = None

    def generate_trace_id(self) -> int:
        requested, self.next_trace_id = self.next_trace_id, None
        return requested if requested is not None else super().generate_trace_id()


class _LinkFirst(Sampler):
    """Samples a new trace if the linked trace is sampled; traces without a link by `rate`."""

    def __init__(self, rate: float):
        self._unlinked = TraceIdRatioBased(rate)

    def should_sample(  # noqa: PLR0917 - the SDK's signature
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        if links:
            sampled = links[0].context.trace_flags.sampled
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP)
        return self._unlinked.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return "LinkFirst"


def _remote(parent: TraceParent) -> trace.SpanContext:
    flags = trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT
    return trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(flags),
    )
