"""Traces: what a collector gets of calls and attempts, and how a delivery leads to its producer."""

import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cli.process.tracing import open_tracer
from core.errors import ConfigurationError
from core.settings import TraceSettings
from postrider.v1 import delivery_service_pb2, event_pb2, event_service_pb2
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.trace_collector import Collector, attributes, collecting

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{CALLER}-01"
UNSAMPLED = f"00-{TRACE}-{CALLER}-00"
EVENT = event_pb2.EventInput(merchant_id="m_1", type="payment.succeeded", payload_text="{}")


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as collector:
        yield collector


@pytest.fixture
def traced(start_platform: Callable[..., Any], collector: Collector) -> Callable[..., Any]:
    """Starts a platform whose spans are all at the collector when it has ended."""

    def start(**settings: Any) -> Any:
        return start_platform(traces=TraceSettings(traces_endpoint=collector.url, **settings))

    return start


async def publish(
    platform: Platform, *trace_parents: str
) -> event_service_pb2.PublishEventResponse:
    metadata = platform.producer() + [("traceparent", text) for text in trace_parents]
    request = event_service_pb2.PublishEventRequest(event=EVENT)
    return await platform.events.PublishEvent(request, metadata=metadata)


async def test_attempt_links_to_the_publishing_call_and_its_trace(
    traced: Callable[..., Any], collector: Collector, receiver: Receiver, logged: list[Any]
) -> None:
    receiver.script.append(500)
    async with traced() as platform:
        await platform.register(f"{receiver.url}?token=hidden")
        async with platform.engine(retry_schedule_seconds="0.01"):
            published = await publish(platform, SAMPLED)
            await receiver.wait_for(2)

    assert not any("traceparent" in webhook.headers for webhook in receiver.webhooks)
    [call] = collector.named("EventService/PublishEvent")
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, CALLER)
    assert call.kind == Span.SPAN_KIND_SERVER
    assert collector.services[call.span_id] == "postrider-server"
    first, second = sorted(collector.named("attempt"), key=lambda span: span.start_time_unix_nano)
    for span in (first, second):
        assert [(link.trace_id, link.span_id) for link in span.links] == [
            (call.trace_id, call.span_id)
        ]
        assert span.kind == Span.SPAN_KIND_CLIENT
        assert collector.services[span.span_id] == "postrider-delivery"
    # One trace of the delivery, which is not the producer's.
    assert first.trace_id == second.trace_id != call.trace_id
    told = attributes(first)
    assert told["postrider.event_id"] == published.event.id
    assert (told["server.address"], told["server.port"]) == ("127.0.0.1", receiver.port)
    assert (told["error.type"], told["http.response.status_code"]) == ("http_error", 500)
    assert told["postrider.connect_ms"] > told["postrider.tls_ms"] > 0  # type: ignore[operator]
    assert (first.status.code, second.status.code) == (
        Status.STATUS_CODE_ERROR,
        Status.STATUS_CODE_UNSET,
    )
    assert "hidden" not in str(collector.spans)
    [line] = [e for e in logged if e["event"] == "attempt" and e["attempt"] == 1]
    assert (line["trace_id"], line["delivery_trace_id"]) == (TRACE, first.trace_id.hex())


async def test_a_call_that_was_refused_has_its_status_in_its_span(
    traced: Callable[..., Any], collector: Collector
) -> None:
    async with traced() as platform:
        async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
            await platform.deliveries.ListDeliveries(
                delivery_service_pb2.ListDeliveriesRequest(), metadata=platform.operator()
            )
        missing: Any = platform.channel.unary_unary("/postrider.v1.Nowhere/Nothing")
        with pytest.raises(grpc.aio.AioRpcError):
            await missing(b"", metadata=platform.merchant())

    [span] = collector.spans
    told = attributes(span)
    assert span.name == "postrider.v1.DeliveryService/ListDeliveries"
    assert told["rpc.grpc.status_code"] == StatusCode.PERMISSION_DENIED.value[0]
    assert told["error.type"] == "SCOPE_MISSING"
    # The caller's fault, not ours.
    assert span.status.code == Status.STATUS_CODE_UNSET


async def test_what_its_caller_does_not_keep_is_not_kept_here(
    traced: Callable[..., Any], collector: Collector, receiver: Receiver
) -> None:
    async with traced() as platform:
        await platform.register(receiver.url)
        async with platform.engine():
            await publish(platform, UNSAMPLED)
            kept = await publish(platform, SAMPLED)
            await receiver.wait_for(2)

    assert len(collector.named("PublishEvent")) == 1
    [attempt] = collector.named("attempt")
    assert attributes(attempt)["postrider.event_id"] == kept.event.id


async def test_a_rate_of_0_keeps_only_what_callers_ask_for(
    traced: Callable[..., Any], collector: Collector
) -> None:
    async with traced(traces_sample_rate=0) as platform:
        await publish(platform)
        await publish(platform, SAMPLED)

    assert [span.trace_id.hex() for span in collector.spans] == [TRACE]


async def test_batches_and_streams_share_the_trace_of_their_call(
    platform: Platform, pool: Any
) -> None:
    metadata = [*platform.producer(), ("traceparent", SAMPLED)]
    await platform.events.PublishEvents(
        event_service_pb2.PublishEventsRequest(events=[EVENT, EVENT]), metadata=metadata
    )
    stream = platform.events.StreamEvents(metadata=metadata)
    await stream.write(event_service_pb2.StreamEventsRequest(sequence=1, events=[EVENT]))
    await stream.read()
    await stream.done_writing()

    stored = await pool.fetch("SELECT trace_parent FROM events")
    assert [row["trace_parent"] for row in stored] == [SAMPLED] * 3


@pytest.mark.parametrize("send", [False, True])
async def test_merchants_hear_of_a_trace_only_when_asked(
    start_platform: Callable[..., Any], receiver: Receiver, send: bool
) -> None:
    async with start_platform(traces=TraceSettings(send_traceparent=send)) as platform:
        await platform.register(receiver.url)
        async with platform.engine():
            await publish(platform, SAMPLED)
            [webhook] = await receiver.wait_for(1)

    assert webhook.headers.get("traceparent") == (SAMPLED if send else None)


async def test_merchant_receives_the_traceparent_of_the_attempt(
    traced: Callable[..., Any], collector: Collector, receiver: Receiver
) -> None:
    async with traced(send_traceparent=True) as platform:
        await platform.register(receiver.url)
        async with platform.engine():
            await publish(platform, SAMPLED)
            [webhook] = await receiver.wait_for(1)

    [span] = collector.named("attempt")
    told = f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert webhook.headers["traceparent"] == told


@pytest.mark.parametrize("sent", [("garbage",), (SAMPLED.upper(),)])
async def test_a_traceparent_that_is_none_counts_as_not_sent(
    platform: Platform, pool: Any, logged: list[Any], sent: tuple[str, ...]
) -> None:
    await publish(platform, *sent)

    assert await pool.fetchval("SELECT trace_parent FROM events") is None
    [line] = [entry for entry in logged if entry["event"] == "rpc"]
    assert line["trace_id"] is None


async def test_traces_without_the_extra_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "cli.process.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    settings = TraceSettings(traces_endpoint="http://127.0.0.1:4318")

    with pytest.raises(ConfigurationError, match=r"pip install 'postrider\[otel\]'"):
        async with open_tracer(settings, "postrider-server"):
            pass


def test_an_endpoint_has_no_credentials() -> None:
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_HEADERS"):
        TraceSettings(traces_endpoint="http://me:hidden@127.0.0.1:4318")
