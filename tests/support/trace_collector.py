"""An OpenTelemetry collector that accepts spans by OTLP over HTTP and keeps them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """The received spans, and the service of each span by its id."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.services: dict[bytes, str] = {}

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name.endswith(name)]

    async def handle(self, request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            about = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans
                self.services |= {s.span_id: str(about["service.name"]) for s in scope.spans}
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )


def attributes(thing: object) -> dict[str, object]:
    """The attributes of a span or a resource, by name."""
    pairs = getattr(thing, "attributes", ())
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a free port of loopback."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()
