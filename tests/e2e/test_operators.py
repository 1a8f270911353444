"""Every line of docs/operators.md, run in its order as it stands there, and its answer."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from postrider.v1 import delivery_pb2, delivery_service_pb2
from tests.fakes.receiver import Receiver
from tests.platform import ISSUER, Platform

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operators.md").read_text()
SETUP, *LINES = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCHEMA = "deploy/envoy/postrider.binpb"

#: For each line its method, and what its answer holds; $NAMES are those of the environment.
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

needs_grpcurl = pytest.mark.skipif(
    shutil.which("grpcurl") is None, reason="grpcurl is not installed"
)

type Environment = dict[str, str]


def sh(line: str, environment: Environment) -> str:
    """What a line that has to succeed prints."""
    done = subprocess.run(
        ["sh", "-euc", line],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def as_written(line: str, environment: Environment) -> list[str]:
    return ["sh", "-euc", line]


def as_buf_curl(line: str, environment: Environment) -> list[str]:
    """The same call; what grpcurl's arguments are, the shell itself tells."""
    if not line.startswith("grpcurl "):
        return as_written(line, environment)
    told = sh(f"grpcurl() {{ printf '%s\\0' \"$@\"; }}\n{line}", environment)
    *given, address, method = told.removesuffix("\0").split("\0")
    command = ["buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    # Only the server describes the health service.
    command += ["--schema", SCHEMA] if method.startswith("postrider.") else []
    arguments = iter(given)
    for argument in arguments:
        match argument:
            case "-plaintext":
                pass
            case "-protoset" | "-max-time":
                next(arguments)
            case "-H" | "-d":
                command += [argument, next(arguments)]
            case _:
                raise AssertionError(f"translate {argument}")
    return [*command, f"http://{address}/{method}"]


async def answer(command: list[str], environment: Environment) -> str:
    """What a call that has to succeed prints, as JSON in one spelling."""
    process = await started(command, environment)
    async with asyncio.timeout(30):
        printed, complaint = await process.communicate()
    assert process.returncode == 0, f"{command}\n{printed.decode()}{complaint.decode()}"
    return json.dumps(json.loads(printed))


async def watched(
    command: list[str], environment: Environment, platform: Platform, until: str
) -> str:
    """What a watch prints while an engine sends what is due; it does not end by itself so soon."""
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


async def started(command: list[str], environment: Environment) -> asyncio.subprocess.Process:
    program = shutil.which(command[0], path=environment["PATH"])
    assert program
    return await asyncio.create_subprocess_exec(
        program,
        *command[1:],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


async def _printed(stream: asyncio.StreamReader, printed: str, until: str) -> str:
    """All that was printed, once it holds `until` in an object that is complete."""
    while not any(until in json.dumps(found) for found in _objects(printed)):
        chunk = await stream.read(65536)
        assert chunk, f"it ended after {printed!r}"
        printed += chunk.decode()
    return printed


def _objects(printed: str) -> list[Any]:
    """The complete JSON objects of a text, one after the other."""
    found, decoder, rest = [], json.JSONDecoder(), printed.lstrip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except json.JSONDecodeError:
            break
        found.append(value)
        rest = rest[end:].lstrip()
    return found


async def stopped_webhook(platform: Platform, receiver: Receiver, merchant_id: str) -> str:
    """A webhook config that two failures made inactive, with a third delivery that waits."""

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


def prepared(data_dir: Path) -> Environment:
    """What the page's first block sets, on a platform whose issuer is the tests'."""
    environment = {
        "HOME": str(data_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WEBHOOK_DATA_DIR": str(data_dir),
        "WEBHOOK_JWT_ISSUER": ISSUER,
    }
    names = re.findall(r"^([A-Z_]+)=", SETUP, re.MULTILINE)
    values = sh(f"{SETUP}printf '%s\\n' {' '.join(f'"${name}"' for name in names)}", environment)
    return environment | dict(zip(names, values.splitlines(), strict=True))


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(as_written, id="grpcurl", marks=needs_grpcurl),
        pytest.param(as_buf_curl, id="buf-curl"),
    ],
)
async def test_every_line_answers_its_question(
    client: Callable[[str, Environment], list[str]],
    start_platform: Callable[..., Any],
    receiver: Receiver,
    logged: list[Any],
    tmp_path: Path,
) -> None:
    since = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    async with start_platform(reflection=True, admin_address="127.0.0.1:0") as platform:
        [admin_port] = [e["port"] for e in logged if e["event"] == "admin_listening"]
        environment = await asyncio.to_thread(prepared, tmp_path)
        merchant_id = environment["MERCHANT"]
        environment |= {
            "ADDRESS": platform.address,
            "ADMIN_ADDRESS": f"127.0.0.1:{admin_port}",
            "SINCE": since,
            "WEBHOOK": await stopped_webhook(platform, receiver, merchant_id),
            "DELIVERY": await failed_delivery(platform, merchant_id),
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
async def test_a_watch_ends_with_its_time_as_the_page_says(
    start_platform: Callable[..., Any], receiver: Receiver, tmp_path: Path
) -> None:
    [line] = [line for line in LINES if "WatchDeliveries" in line]
    assert " -max-time 60 " in line
    async with start_platform(reflection=True) as platform:
        environment = await asyncio.to_thread(prepared, tmp_path)
        created = await platform.register(receiver.url, environment["MERCHANT"])
        environment |= {"ADDRESS": platform.address, "WEBHOOK": created.webhook_config.id}
        shorter = line.replace(" -max-time 60 ", " -max-time 1 ")
        process = await started(as_written(shorter, environment), environment)
        async with asyncio.timeout(30):
            _, complaint = await process.communicate()

    assert process.returncode == 68
    assert "DeadlineExceeded" in complaint.decode()
