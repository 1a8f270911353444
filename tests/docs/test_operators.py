"""Runs every line of docs/operate/operators.md in order, and checks its answer."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from postrider.v1 import delivery_pb2, delivery_service_pb2
from tests.support.doc_pages import (
    Environment,
    answer,
    as_buf_curl,
    as_written,
    blocks,
    needs_grpcurl,
    prepared,
    started,
)
from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.receiver import Receiver

SETUP, *LINES = blocks((ROOT / "docs/operate/operators.md").read_text())

#: The method and the expected output of each line. $NAMES come from the environment.
PROMISES = (
    ("GetQueueStatus", ('"parked": "1"', '"webhookId": "$WEBHOOK"')),
    ("GetQueueStatus", ('"parked": "1"', '"webhookId": "$WEBHOOK"')),
    ("Check", ('"status": "SERVING"',)),
    ("Check", ('"status": "SERVING"',)),
    ("GetQueueStatus", ('"parked": "1"', '"webhookId": "$WEBHOOK"', '"merchantId": "$MERCHANT"')),
    ("GetQueueStatus", ('"parked": "1"', '"webhookId": "$WEBHOOK"')),
    ("CheckInvariants", ('"name": "event_has_deliveries"', '"examined": "3"', '"complete": true')),
    (
        "ListAllWebhookConfigs",
        (
            '"id": "$WEBHOOK"',
            '"deactivationReason": "DEACTIVATION_REASON_FAILURES"',
            '"consecutiveFailures": 2',
        ),
    ),
    ("ListAuditEntries", ('"action": "CreateWebhookConfig"', '"resource": "$WEBHOOK"')),
    (
        "ListDeliveries",
        (
            '"outcome": "OUTCOME_HTTP_ERROR"',
            '"statusCode": 500',
            '"responseExcerpt": "no disk left"',
            '"firstByteDuration": ',
        ),
    ),
    ("ListDeliveries", ('"state": "DELIVERY_STATE_FAILED"', '"id": "$DELIVERY"')),
    ("GetDelivery", ('"id": "$DELIVERY"', '"statusCode": 500')),
    ("ReactivateWebhookConfig", ('"id": "$WEBHOOK"', '"active": true')),
    ("RedeliverDelivery", ('"redeliveryOf": "$DELIVERY"',)),
    ("RedeliverDeliveries", ('"redelivered": 1', '"alreadyRedelivered": 1')),
    ("RedeliverDeliveries", ('"redelivered": 1', '"alreadyRedelivered": 1')),
    ("WatchDeliveries", ('"redeliveryOf": "$DELIVERY"', '"outcome": "OUTCOME_SUCCEEDED"')),
    (
        "DeactivateWebhookConfig",
        ('"active": false', '"deactivationReason": "DEACTIVATION_REASON_ADMIN"'),
    ),
    (
        "ListAuditEntries",
        (
            '"action": "DeactivateWebhookConfig"',
            '"action": "ReactivateWebhookConfig"',
            '"actor": "$ACTOR"',
            "ticket 4711",
        ),
    ),
    ("ListAuditEntries", ('"actor": "$ACTOR"', '"action": "DeactivateWebhookConfig"')),
    ("CreateEventType", ('"name": "terminal.activated"',)),
    ("EraseMerchant", ('"deletedWebhookConfigs": 1', '"erasedEvents": "3"')),
)


async def watched(
    command: list[str], environment: Environment, platform: Platform, until: str
) -> str:
    """Return the output of a watch while an engine delivers. The watch is still running then."""
    process = await started(command, environment)
    assert process.stdout
    seen: list[Any] = []
    try:
        async with asyncio.timeout(30):
            printed = await _printed(process.stdout, "", "resumeToken")
            async with platform.engine():
                printed = await _printed(process.stdout, printed, until)
        seen = list(_objects(printed))
        assert process.returncode is None
    finally:
        if process.returncode is None:
            # The shell may have a child.
            os.killpg(process.pid, signal.SIGTERM)
        await process.communicate()
    assert "delivery" not in seen[0]
    return json.dumps(seen)


async def _printed(stream: asyncio.StreamReader, printed: str, until: str) -> str:
    """Read until a complete object contains `until`, and return the whole output."""
    while not any(until in json.dumps(found) for found in _objects(printed)):
        chunk = await stream.read(65536)
        assert chunk, f"it ended after {printed!r}"
        printed += chunk.decode()
    return printed


def _objects(printed: str) -> list[Any]:
    """Return the complete JSON objects at the beginning of a text."""
    found, decoder, rest = [], json.JSONDecoder(), printed.lstrip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except json.JSONDecodeError:
            break
        found.append(value)
        rest = rest[end:].lstrip()
    return found


async def deactivated_webhook(platform: Platform, receiver: Receiver, merchant_id: str) -> str:
    """Return a config that two failures deactivated. A third delivery is parked."""

    async def broken(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="no disk left")

    receiver.default = broken
    created = await platform.register(receiver.url, merchant_id)
    async with platform.engine(max_retries=0, max_consecutive_failures=2):
        for _ in range(2):
            await platform.publish(merchant_id=merchant_id)
        await receiver.wait_for(2)
    await platform.publish(merchant_id=merchant_id)
    receiver.default = 200
    return created.webhook_config.id


async def failed_delivery(platform: Platform, merchant_id: str) -> str:
    listed = await platform.deliveries.ListDeliveries(
        delivery_service_pb2.ListDeliveriesRequest(state=delivery_pb2.DELIVERY_STATE_FAILED),
        metadata=platform.merchant(merchant_id),
    )
    return str(listed.deliveries[0].id)


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(as_written, id="grpcurl", marks=needs_grpcurl),
        pytest.param(as_buf_curl, id="buf-curl"),
    ],
)
async def test_operators_page_lines_print_their_answers(
    client: Callable[[str, Environment], list[str]],
    start_platform: Callable[..., Any],
    receiver: Receiver,
    logged: list[Any],
    tmp_path: Path,
) -> None:
    since = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    async with start_platform(reflection=True, admin_address="127.0.0.1:0") as platform:
        [admin_port] = [e["port"] for e in logged if e["event"] == "admin_listening"]
        environment = await asyncio.to_thread(prepared, SETUP, tmp_path)
        merchant_id = environment["MERCHANT"]
        environment |= {
            "ADDRESS": platform.address,
            "ADMIN_ADDRESS": f"127.0.0.1:{admin_port}",
            "SINCE": since,
            "WEBHOOK": await deactivated_webhook(platform, receiver, merchant_id),
            "DELIVERY": await failed_delivery(platform, merchant_id),
            "UNTIL": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        for line, (method, promised) in zip(LINES, PROMISES, strict=True):
            assert re.search(rf"/{method}\"?$", line), line
            expected = [
                re.sub(r"\$([A-Z]+)", lambda name: environment[name[1]], text) for text in promised
            ]
            command = await asyncio.to_thread(client, line, environment)
            if method == "WatchDeliveries":
                printed = await watched(command, environment, platform, expected[0])
            else:
                printed = await answer(command, environment)
            assert [text for text in expected if text not in printed] == [], f"{line}\n{printed}"


@needs_grpcurl
async def test_watch_ends_at_its_time_limit(
    start_platform: Callable[..., Any], receiver: Receiver, tmp_path: Path
) -> None:
    [line] = [line for line in LINES if "WatchDeliveries" in line]
    assert " -max-time 60 " in line
    async with start_platform(reflection=True) as platform:
        environment = await asyncio.to_thread(prepared, SETUP, tmp_path)
        created = await platform.register(receiver.url, environment["MERCHANT"])
        environment |= {"ADDRESS": platform.address, "WEBHOOK": created.webhook_config.id}
        shorter = line.replace(" -max-time 60 ", " -max-time 1 ")
        process = await started(as_written(shorter, environment), environment)
        async with asyncio.timeout(30):
            _, stderr = await process.communicate()

    assert process.returncode == 68
    assert "DeadlineExceeded" in stderr.decode()
