"""Opens the span exporter, which needs the extra `otel`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.errors import ConfigurationError
from core.settings import TraceSettings
from core.tracing import Tracer


@asynccontextmanager
async def open_tracer(settings: TraceSettings, service: str) -> AsyncIterator[Tracer | None]:
    """Yield a tracer, or None without an endpoint. Sends the remaining spans at the end.

    Raises ConfigurationError if the extra is missing.
    """
    if settings.traces_endpoint is None:
        yield None
        return
    try:
        from cli.process.spans import OpenTelemetry  # noqa: PLC0415 - needs the extra
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
