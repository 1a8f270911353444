"""Log lines of calls and attempts. docs/operate/observability.md lists their fields."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.logs import SuccessSampling
from core.settings import LogSettings, TraceSettings
from postrider.v1 import delivery_service_pb2
from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.trace_collector import attributes, collecting

_ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)
PAGE = (ROOT / "docs/operate/observability.md").read_text()
SECTIONS = {
    title: set(_ROW.findall(text))
    for title, _, text in (part.partition("\n") for part in re.split(r"(?m)^###? ", PAGE))
}
_BY_THE_LOG = {"event", "log_level"}


async def list_deliveries(platform: Platform, metadata: Any) -> None:
    request = delivery_service_pb2.ListDeliveriesRequest()
    await platform.deliveries.ListDeliveries(request, metadata=metadata)


async def test_lines_and_spans_have_what_the_page_says_and_no_more(
    start_platform: Callable[..., Any], receiver: Receiver, logged: list[Any]
) -> None:
    receiver.script.append(500)
    async with collecting() as collector:
        async with start_platform(
            traces=TraceSettings(traces_endpoint=collector.url),
            logs=LogSettings(log_success_sample_rate=0.999_999_999),
        ) as platform:
            await platform.register(receiver.url)
            async with platform.engine(retry_schedule_seconds="0.01"):
                await platform.publish()
                await receiver.wait_for(2)
                await platform.publish()
                await receiver.wait_for(3)
            await list_deliveries(platform, platform.merchant())
            async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
                await list_deliveries(platform, platform.operator())
        spans = {name: collector.named(name) for name in ("attempt", "ListDeliveries")}

    assert fields(logged, "rpc") == SECTIONS['A call: `"event": "rpc"`']
    assert fields(logged, "attempt") == SECTIONS['An attempt: `"event": "attempt"`']
    assert told(spans["ListDeliveries"]) == SECTIONS["Attributes of an RPC span"]
    assert told(spans["attempt"]) == SECTIONS["Attributes of an attempt span"]


async def test_sample_rate_0_writes_no_line_for_successes(
    start_platform: Callable[..., Any], receiver: Receiver, logged: list[Any]
) -> None:
    receiver.script += [200, 503]
    # A busy machine is not to make anything slow.
    logs = LogSettings(log_success_sample_rate=0, log_slow_seconds=60)
    async with start_platform(logs=logs) as platform:
        await platform.register(receiver.url)
        async with platform.engine(retry_schedule_seconds="0.01"):
            await platform.publish()
            await receiver.wait_for(1)
            await platform.publish()
            await receiver.wait_for(3)
        async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
            await list_deliveries(platform, platform.operator())

    attempts = [e for e in logged if e["event"] == "attempt"]
    assert [(e["attempt"], e["status"]) for e in attempts] == [(1, 503), (2, 200)]
    calls = [e for e in logged if e["event"] == "rpc"]
    assert [e["reason"] for e in calls] == ["SCOPE_MISSING"]
    assert not any("sample_rate" in e for e in (*attempts, *calls))


async def test_what_is_slow_is_always_written(
    start_platform: Callable[..., Any], receiver: Receiver, logged: list[Any]
) -> None:
    logs = LogSettings(log_success_sample_rate=0, log_slow_seconds=1e-9)
    async with start_platform(logs=logs) as platform:
        await platform.register(receiver.url)
        async with platform.engine():
            await platform.publish()
            await receiver.wait_for(1)

    told = [(e["event"], e.get("sample_rate")) for e in logged if e["event"] in ("rpc", "attempt")]
    # The lines of the registration, the publication and the attempt.
    assert sorted(told) == [("attempt", None), ("rpc", None), ("rpc", None)]


async def test_calls_that_end_without_us_have_a_line_too(
    platform: Platform, logged: list[Any]
) -> None:
    health: Any = health_pb2_grpc.HealthStub(platform.channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    missing: Any = platform.channel.unary_unary("/postrider.v1.DeliveryService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError):
        await missing(b"", metadata=platform.merchant())

    def codes() -> list[str]:
        return [e["code"] for e in logged if e["event"] == "rpc"]

    # The caller gets the status before the line is written.
    async with asyncio.timeout(10):
        while len(codes()) < 2:  # noqa: ASYNC110 - a list is all there is
            await asyncio.sleep(0)
    assert codes() == ["NOT_FOUND", "UNIMPLEMENTED"]


def test_the_same_number_is_drawn_everywhere_and_so_many_of_all() -> None:
    sampling, other = (SuccessSampling(LogSettings(log_success_sample_rate=0.25)) for _ in "12")
    numbers = range(0, 2**34, 2**34 // 10_007)

    drawn = [n for n in numbers if sampling.selects(n)]

    assert drawn == [n for n in numbers if other.selects(n)]
    assert len(drawn) / len(numbers) == pytest.approx(0.25, abs=0.01)
    assert sampling.log_fields == {"sample_rate": 0.25}


def fields(logged: list[Any], event: str) -> set[str]:
    entries = [entry for entry in logged if entry["event"] == event]
    return {name for entry in entries for name in entry} - _BY_THE_LOG


def told(spans: Any) -> set[str]:
    return {name for span in spans for name in attributes(span)}
