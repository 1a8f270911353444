"""Stage: what is told of an attempt when it is over: its log line, and a span where traces are on.

The span belongs to a trace of the delivery, and links to the producer's, whose call ended before.
Neither has a payload, a secret or a URL: paths and query strings of webhooks hold credentials.
"""

from collections.abc import Mapping
from hashlib import blake2b

import structlog

from core.ids import format_id
from core.lifecycle import DeliveryState, Outcome
from core.logs import SuccessSampling
from core.queue import LeasedDelivery, Settlement
from core.tracing import Span, SpanKind, TraceParent, Tracer, parse_trace_parent
from delivery.http.request import Destination

log = structlog.get_logger()


class AttemptReports:
    """The reports of one engine; spans where there is a `tracer`."""

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
        """An attempt begins now."""
        producer, span = None, None
        if self._tracer is not None or self._send_traceparent:
            producer = parse_trace_parent(delivery.trace_parent)
        if self._tracer is not None:
            trace_id = _trace_id(delivery)
            span = self._tracer.start("attempt", SpanKind.CLIENT, link=producer, trace_id=trace_id)
        told = None
        if self._send_traceparent:
            told = span.trace_parent if span is not None else producer
        return AttemptReport(delivery, self._sampling, span, told)


class AttemptReport:
    """Of one attempt, from its beginning on; `told_trace_parent` is what its receiver is told."""

    __slots__ = ("_delivery", "_sampling", "_span", "told_trace_parent")

    def __init__(
        self,
        delivery: LeasedDelivery,
        sampling: SuccessSampling,
        span: Span | None,
        told: TraceParent | None,
    ):
        self._delivery = delivery
        self._sampling = sampling
        self._span = span
        self.told_trace_parent = told

    def end(self, settlement: Settlement, destination: Destination | None) -> None:
        """Tell of it; no destination is one that does not pass any more."""
        if self._span is not None:
            _end(self._span, self._delivery, settlement, destination)
        drawn: Mapping[str, float] = {}
        if self._went_well_at_once(settlement):
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
            # It was found to be well-formed before it was stored.
            trace_id=delivery.trace_parent[3:35] if delivery.trace_parent else None,
            delivery_trace_id=self._span.trace_parent.trace_id if self._span is not None else None,
            **drawn,
        )

    def _went_well_at_once(self, settlement: Settlement) -> bool:
        return (
            settlement.final_state is DeliveryState.DELIVERED
            and self._delivery.attempt_count == 0
            and settlement.result.duration_us < self._sampling.slow_seconds * 1_000_000
        )


def _state(settlement: Settlement) -> str:
    return settlement.final_state.value if settlement.final_state else "ready"


def _trace_id(delivery: LeasedDelivery) -> int:
    """One trace for all attempts of a delivery, whichever engines make them.

    Not the id itself, which begins with its time: sampling wants any bits of a trace id random.
    """
    return int.from_bytes(blake2b(delivery.id.bytes, digest_size=16).digest())


def _end(
    span: Span, delivery: LeasedDelivery, settlement: Settlement, destination: Destination | None
) -> None:
    fault = (
        None if settlement.result.outcome is Outcome.SUCCEEDED else settlement.result.outcome.value
    )
    attributes: dict[str, str | int | float | None] = {
        "http.request.method": "POST",
        "http.response.status_code": settlement.result.status_code,
        "server.address": destination.url.raw_host if destination else None,
        "server.port": destination.url.port if destination else None,
        "error.type": fault,
        "postrider.webhook_id": format_id("wh", delivery.webhook_id),
        "postrider.merchant_id": delivery.merchant_id,
        "postrider.event_id": format_id("evt", delivery.event_id),
        "postrider.event_type": delivery.event_type,
        "postrider.delivery_id": format_id("dlv", delivery.id),
        "postrider.attempt": delivery.attempt_count + 1,
        "postrider.outcome": settlement.result.outcome.value,
        "postrider.state": _state(settlement),
        "postrider.dns_ms": _ms(settlement.result.dns_us),
        "postrider.connect_ms": _ms(settlement.result.connect_us),
        "postrider.tls_ms": _ms(settlement.result.tls_us),
        "postrider.first_byte_ms": _ms(settlement.result.first_byte_us),
        "postrider.duration_ms": _ms(settlement.result.duration_us),
        "postrider.retry_seconds": settlement.next_attempt_in_seconds or None,
    }
    span.end({name: value for name, value in attributes.items() if value is not None}, fault)


def _ms(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1000
