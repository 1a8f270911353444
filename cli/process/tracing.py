"""Whether spans are kept, and by what: the way to the extra `otel` from the processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.errors import ConfigurationError
from core.settings import TraceSettings
from core.tracing import Tracer


@asynccontextmanager
async def open_tracer(settings: TraceSettings, service: str) -> AsyncIterator[Tracer | None]:
    """None where no endpoint is set; ConfigurationError where one is and the extra is missing.

    Spans that are still here at the end of the context are sent, if the collector takes them soon.
    """
    if settings.traces_endpoint is None:
        yield None
        return
    try:
        from cli.process.spans import OpenTelemetry  # noqa: PLC0415 - what it imports may be missing
    except ImportError as error:
        raise ConfigurationError(
            f"WEBHOOK_TRACES_ENDPOINT needs OpenTelemetry, and {error.name} is missing: install "
            "Postrider with its extra, as in `pip install 'postrider[otel]'`, or unset the variable"
        ) from None
    tracer = OpenTelemetry(str(settings.traces_endpoint), settings.traces_sample_rate, service)
    try:
        yield tracer
    finally:
        await asyncio.to_thread(tracer.close)
