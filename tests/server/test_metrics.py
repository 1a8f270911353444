"""Metrics of a server, read through its listener."""

from collections.abc import Callable
from typing import Any

import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import ConfigurationError
from postrider.v1 import event_pb2
from tests.support.platform import Platform
from tests.support.rpcs import code_of, methods
from tests.support.scrape import scrape

# The port of the listener is in the log, so `logged` starts before the platform.
pytestmark = [
    pytest.mark.usefixtures("logged"),
    pytest.mark.server(server_metrics_address="127.0.0.1:0"),
]


def port_of(logged: list[Any]) -> int:
    [port] = [entry["port"] for entry in logged if entry["event"] == "metrics_listening"]
    return int(port)


async def test_calls_are_counted_by_method_and_code(platform: Platform, logged: list[Any]) -> None:
    await platform.publish()
    await platform.publish()

    async def call(path: str, metadata: Any = None) -> StatusCode:
        channel: Any = platform.channel
        return await code_of(channel.unary_unary(path)(b"", metadata=metadata))

    assert await call("/postrider.v1.EventService/PublishEvent") is StatusCode.UNAUTHENTICATED
    for unknown in ("/postrider.v1.EventService/Unknown", "/a/b", "/x.Y/" + "z" * 500):
        assert await call(unknown) is StatusCode.UNAUTHENTICATED
        assert await call(unknown, platform.producer()) is StatusCode.UNIMPLEMENTED
    health: Any = health_pb2_grpc.HealthStub(platform.channel)
    await health.Check(health_pb2.HealthCheckRequest())
    await code_of(health.Check(health_pb2.HealthCheckRequest(service="unknown")))

    scraped = await scrape(port_of(logged))

    calls = "postrider_rpcs_total"
    publish = "EventService/PublishEvent"
    assert scraped.sum(calls, method=publish, code="OK") == 2
    assert scraped.sum(calls, method=publish, code="UNAUTHENTICATED") == 1
    assert scraped.sum(calls, method="unknown", code="UNAUTHENTICATED") == 3
    assert scraped.sum(calls, method="unknown", code="UNIMPLEMENTED") == 3
    assert scraped.sum(calls, method="Health/Check", code="OK") == 1
    assert scraped.sum(calls, method="Health/Check", code="NOT_FOUND") == 1
    assert scraped.sum("postrider_rpc_duration_seconds_count", method=publish) == 3
    assert scraped.values("postrider_rpc_duration_seconds_count", method="unknown") == []
    # The health service has three methods and reflection has one.
    counted = {sample.labels["method"] for sample in scraped.families["postrider_rpcs"].samples}
    assert len(counted) == len(methods()) + 4 + 1


async def test_events_are_counted_by_result(platform: Platform, logged: list[Any]) -> None:

    def event(key: str, payload: str = "{}", kind: str = "payment.succeeded") -> Any:
        return event_pb2.EventInput(
            merchant_id="m_1", type=kind, payload_text=payload, idempotency_key=key
        )

    for events in (
        [event("a"), event("b"), event("c", kind="never.registered")],
        [event("a"), event("b", payload='{"other": 1}'), event("d")],
    ):
        await platform.as_producer().PublishEvents(events=events)
    scraped = await scrape(port_of(logged))

    results = {
        result: scraped.sum("postrider_events_total", result=result)
        for result in ("accepted", "duplicate", "rejected")
    }
    assert results == {"accepted": 3, "duplicate": 1, "rejected": 2}
    assert scraped.sum("postrider_commit_duration_seconds_count") == 2
    assert scraped.sum("postrider_commit_events_sum") == 2 + 3
    assert scraped.values("postrider_jwks_age_seconds") == []


async def test_watcher_is_counted_until_its_stream_ends(
    platform: Platform, logged: list[Any]
) -> None:
    watching = platform.as_merchant().WatchDeliveries()
    await watching.read()
    assert (await scrape(port_of(logged))).sum("postrider_watchers") == 1

    watching.cancel()
    while (scraped := await scrape(port_of(logged))).sum("postrider_watchers"):
        pass
    watch = "DeliveryService/WatchDeliveries"
    assert scraped.sum("postrider_rpcs_total", method=watch, code="CANCELLED") == 1
    assert scraped.values("postrider_rpc_duration_seconds_count", method=watch) == []


async def test_configured_metrics_address_in_use_is_an_error(
    platform: Platform, start_platform: Callable[..., Any], logged: list[Any]
) -> None:
    port = port_of(logged)
    with pytest.raises(ConfigurationError, match="WEBHOOK_SERVER_METRICS_ADDRESS"):
        async with start_platform(server_metrics_address=f"127.0.0.1:{port}"):
            pass
