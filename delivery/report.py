"""Stage: writes the log line and, with tracing on, the span of an attempt.

The span belongs to the trace of the delivery and links to the trace of the publish call. Line and
span contain no payload, secret or URL, because paths and query strings may hold credentials.
"""

from collections.abc import Mapping
from hashlib import blake2b

import structlog

from core.ids import format_id
from core.lifecycle import DeliveryState, Outcome
from core.logs import SuccessSampling
from core.queue import LeasedDelivery, Settlement
from core.tracing import Span, SpanKind, TraceParent, Tracer, parse_trace_parent
from delivery.http.request import RequestTemplate

log = structlog.get_logger()


class AttemptReports:
    """Creates the reports of one engine. Without a `tracer` there are no spans."""

    def __init__(
        self,
        sampling: SuccessSampling,
        tracer: Tracer | None = None,
        *,
        send_traceparent: bool = False,
    ):
        self._sampling = sampling
        self._tracer = tracer
        self._send_traceparent = send_traceparent

    def begin(self, delivery: LeasedDelivery) -> "AttemptReport":
        """Start the report when the attempt starts."""
        producer, span = None, None
        if self._tracer is not None or self._send_traceparent:
            producer = parse_trace_parent(delivery.trace_parent)
        if self._tracer is not None:
            trace_id = _trace_id(delivery)
            span = self._tracer.start("attempt", SpanKind.CLIENT, link=producer, trace_id=trace_id)
        sent = None
        if self._send_traceparent:
            sent = span.trace_parent if span is not None else producer
        return AttemptReport(delivery, self._sampling, span, sent)


class AttemptReport:
    """The report of one attempt. `sent_trace_parent` is the header for the receiver, if any."""

    __slots__ = ("_delivery", "_sampling", "_span", "sent_trace_parent")

    def __init__(
        self,
        delivery: LeasedDelivery,
        sampling: SuccessSampling,
        span: Span | None,
        sent_trace_parent: TraceParent | None,
    ):
        self._delivery = delivery
        self._sampling = sampling
        self._span = span
        self.sent_trace_parent = sent_trace_parent

    def end(self, settlement: Settlement, request_template: RequestTemplate | None) -> None:
        """Write the line and end the span. `destination` is None if the URL is not allowed."""
        if self._span is not None:
            _end(self._span, self._delivery, settlement, request_template)
        drawn: Mapping[str, float] = {}
        if self._is_plain_success(settlement):
            if not self._sampling.selects(self._delivery.id.int):
                return
            drawn = self._sampling.log_fields
        delivery = self._delivery
        log.info(
            "attempt",
            webhook_id=format_id("wh", delivery.webhook_id),
            merchant_id=delivery.merchant_id,
            event_id=format_id("evt", delivery.event_id),
            event_type=delivery.event_type,
            delivery_id=format_id("dlv", delivery.id),
            attempt=delivery.attempt_count + 1,
            outcome=settlement.result.outcome.value,
            status=settlement.result.status_code,
            duration_ms=settlement.result.duration_us / 1000,
            state=_state(settlement),
            retry_seconds=settlement.next_attempt_in_seconds or None,
            # Validated before it was stored.
            trace_id=delivery.trace_parent[3:35] if delivery.trace_parent else None,
            delivery_trace_id=self._span.trace_parent.trace_id if self._span is not None else None,
            **drawn,
        )

    def _is_plain_success(self, settlement: Settlement) -> bool:
        return (
            settlement.final_state is DeliveryState.DELIVERED
            and self._delivery.attempt_count == 0
            and settlement.result.duration_us < self._sampling.slow_seconds * 1_000_000
        )


def _state(settlement: Settlement) -> str:
    return settlement.final_state.value if settlement.final_state else "ready"


def _trace_id(delivery: LeasedDelivery) -> int:
    """Return the trace id of a delivery, the same in every engine.

    It is a hash of the delivery id, because sampling needs random bits and an id starts with its
    time.
    """
    return int.from_bytes(blake2b(delivery.id.bytes, digest_size=16).digest())


def _end(
    span: Span,
    delivery: LeasedDelivery,
    settlement: Settlement,
    request_template: RequestTemplate | None,
) -> None:
    result = settlement.result
    error = None if result.outcome is Outcome.SUCCEEDED else result.outcome.value
    attributes: dict[str, str | int | float | None] = {
        "http.request.method": "POST",
        "http.response.status_code": result.status_code,
        "server.address": request_template.url.raw_host if request_template else None,
        "server.port": request_template.url.port if request_template else None,
        "error.type": error,
        "postrider.webhook_id": format_id("wh", delivery.webhook_id),
        "postrider.merchant_id": delivery.merchant_id,
        "postrider.event_id": format_id("evt", delivery.event_id),
        "postrider.event_type": delivery.event_type,
        "postrider.delivery_id": format_id("dlv", delivery.id),
        "postrider.attempt": delivery.attempt_count + 1,
        "postrider.outcome": result.outcome.value,
        "postrider.state": _state(settlement),
        "postrider.dns_ms": _ms(result.dns_us),
        "postrider.connect_ms": _ms(result.connect_us),
        "postrider.tls_ms": _ms(result.tls_us),
        "postrider.first_byte_ms": _ms(result.first_byte_us),
        "postrider.duration_ms": _ms(result.duration_us),
        "postrider.retry_seconds": settlement.next_attempt_in_seconds or None,
    }
    span.end({name: value for name, value in attributes.items() if value is not None}, error)


def _ms(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1000
