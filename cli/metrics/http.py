"""Where Prometheus asks, and probes that speak HTTP: a listener of its own, without tokens.

/metrics has all figures, as text or OpenMetrics. /live answers as long as the process does;
/ready with 503 while it does not do what it is there for.
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


class Place(NamedTuple):
    """Where to listen, if at all, and the setting that says so."""

    address: str | None
    setting: str
    #: What nobody set, nobody relies on.
    is_default: bool

    @classmethod
    def of(cls, settings: SettingsBlock, field: str) -> "Place":
        return cls(
            getattr(settings, field), variable_name(field), field not in settings.model_fields_set
        )


@asynccontextmanager
async def listening(place: Place, metrics: Metrics) -> AsyncIterator[None]:
    """Answer as long as the context lasts, unless it is off.

    ConfigurationError when an address that was set cannot be had. By default a second process on a
    machine finds the first one there, and works all the same.
    """
    if place.address is None:
        yield
        return
    runner = web.AppRunner(_application(metrics), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await _listen(runner, place)
        yield
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, place: Place) -> None:
    address = place.address or ""
    host, _, port = address.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, ValueError, OverflowError) as error:
        if not place.is_default:
            raise ConfigurationError(
                f"cannot listen on {address} for metrics ({_reason(error)}): stop what uses it, "
                f"set {place.setting} to another host:port, or to `off`"
            ) from None
        log.warning(
            "metrics_listener_off",
            address=address,
            message=f"the address is taken; set {place.setting} for a listener of its own",
        )
        return
    log.info("metrics_listening", address=address, port=runner.addresses[0][1])


def _reason(error: Exception) -> str:

    return (error.strerror or repr(error)) if isinstance(error, OSError) else "it is not host:port"


def _application(metrics: Metrics) -> web.Application:
    async def answer_metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = encode(_Collected(await metrics.scrape()))
        response = web.Response(body=body, headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    async def answer_live(_: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def answer_ready(_: web.Request) -> web.Response:
        if await metrics.is_ready():
            return web.Response(text="ready\n")
        return web.Response(text="not ready: the database is not reached\n", status=503)

    application = web.Application()
    application.router.add_get("/metrics", answer_metrics)
    application.router.add_get("/live", answer_live)
    application.router.add_get("/ready", answer_ready)
    return application


class _Collected(Collector):
    """What has been collected already, for the library's encoders."""

    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
