"""The HTTP listener for Prometheus and probes, without authentication.

/metrics returns all metrics, as text or OpenMetrics. /live returns 200 while the process runs, and
/ready returns 503 while the process is not ready.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import structlog
from aiohttp import web
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cli.metrics.process import Metrics
from core.errors import ConfigurationError
from core.settings import SettingsBlock, variable_name

log = structlog.get_logger()


class MetricsAddress(NamedTuple):
    """The address of a listener, or None for no listener, and its setting."""

    host_port: str | None
    setting: str
    is_default: bool

    @classmethod
    def from_settings(cls, settings: SettingsBlock, field: str) -> "MetricsAddress":
        return cls(
            getattr(settings, field), variable_name(field), field not in settings.model_fields_set
        )


@asynccontextmanager
async def serve_metrics(address: MetricsAddress, metrics: Metrics) -> AsyncIterator[None]:
    """Serve the metrics while the context lasts.

    Raises ConfigurationError if a configured address is in use. A default address in use is only a
    warning, so that a second process on one machine works without settings.
    """
    if address.host_port is None:
        yield
        return
    runner = web.AppRunner(_application(metrics), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await _listen(runner, address)
        yield
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, address: MetricsAddress) -> None:
    host, _, port = (address.host_port or "").rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, ValueError, OverflowError) as error:
        if not address.is_default:
            raise ConfigurationError(
                f"cannot listen on {address.host_port} for metrics ({_reason(error)}): stop the "
                f"process that uses it, set {address.setting} to another host:port, or to `off`"
            ) from None
        log.warning(
            "metrics_listener_off",
            address=address.host_port,
            message=f"the address is in use: set {address.setting} to another host:port",
        )
        return
    log.info("metrics_listening", address=address.host_port, port=runner.addresses[0][1])


def _reason(error: Exception) -> str:
    return (error.strerror or repr(error)) if isinstance(error, OSError) else "it is not host:port"


def _application(metrics: Metrics) -> web.Application:
    async def answer_metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = encode(_Scraped(await metrics.scrape()))
        response = web.Response(body=body, headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    async def answer_live(_: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def answer_ready(_: web.Request) -> web.Response:
        if await metrics.is_ready():
            return web.Response(text="ready\n")
        return web.Response(text="not ready: the database cannot be reached\n", status=503)

    application = web.Application()
    application.router.add_get("/metrics", answer_metrics)
    application.router.add_get("/live", answer_live)
    application.router.add_get("/ready", answer_ready)
    return application


class _Scraped(Collector):
    """Adapts collected metrics to the library's encoders."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
