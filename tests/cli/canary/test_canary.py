"""`postrider canary` as cron runs it: a real process against a real server and engine."""

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from time import time
from typing import Any

import pytest
import trustme

from postrider.v1 import webhook_config_service_pb2 as pb
from tests.support.platform import Platform
from tests.support.processes import POSTRIDER
from tests.support.receiver import Receiver


@pytest.fixture
def command(platform: Platform, authority: trustme.CA, tmp_path: Path) -> list[str]:
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "receiver.pem"))
    (tmp_path / "publish").write_text(platform.token("events:publish"))
    (tmp_path / "manage").write_text(platform.token("webhooks:manage", merchant_id="canary"))
    return [
        *(str(POSTRIDER), "canary", "--address", platform.address, "--listen", "127.0.0.1:0"),
        *("--certificate-file", str(tmp_path / "receiver.pem")),
        *("--publish-token-file", str(tmp_path / "publish")),
        *("--manage-token-file", str(tmp_path / "manage")),
    ]


async def start(command: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command, env={"PATH": os.environ["PATH"]}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, dict[str, Any]]:
    async with asyncio.timeout(40):
        printed, _ = await process.communicate()
    report: dict[str, Any] = json.loads(printed)
    return process.returncode, report


async def left(platform: Platform) -> list[str]:
    listed = await platform.webhooks.ListWebhookConfigs(
        pb.ListWebhookConfigsRequest(), metadata=platform.merchant("canary")
    )
    return [config.description for config in listed.webhook_configs]


async def test_all_is_well_and_only_leftovers_are_removed(
    platform: Platform, receiver: Receiver, command: list[str]
) -> None:
    ours = f"postrider canary {'0' * 16} until"
    keep = [f"{ours} {int(time()) + 600}", f"not a {ours} 1000000000"]
    for description in (*keep, f"{ours} {int(time()) - 1}"):
        await platform.register(receiver.url, "canary", description=description)
    async with platform.engine():
        code, report = await ended(await start(command))

    assert (code, report["ok"], report["error"]) == (0, True, None)
    assert list(report["steps"]) == [
        *("sweep", "create", "deliver", "idempotency", "history", "rotate", "pause", "delete")
    ]
    assert report["removed_leftovers"] == 1
    assert await left(platform) == keep


@pytest.mark.slow
async def test_without_an_engine_it_says_which_step_and_why(
    platform: Platform, command: list[str]
) -> None:
    code, report = await ended(await start([*command, "--timeout", "2"]))

    assert (code, report["failed_step"]) == (1, "deliver")
    assert "check that an engine runs" in report["error"]
    assert await left(platform) == []


@pytest.mark.slow
async def test_interrupted_it_removes_what_it_made(
    platform: Platform, pool: Any, command: list[str]
) -> None:
    process = await start(command)
    async with asyncio.timeout(20):
        while not await pool.fetchval("SELECT EXISTS (SELECT FROM webhook_configs)"):
            pass
    process.send_signal(signal.SIGTERM)
    code, report = await ended(process)

    assert (code, report["error"]) == (1, "interrupted")
    assert await left(platform) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "step", "said"),
    [
        (["--token-file", "/nowhere"], 2, "start", "cannot be read"),
        (["--public-url", "http://x"], 2, "start", "https://"),
        (["--public-url", "https://127.0.0.1:9"], 1, "create", "did not answer the ping"),
        (["--merchant", "m_2"], 1, "sweep", "UNAUTHENTICATED"),
    ],
)
async def test_what_is_wrong_is_said(
    *, command: list[str], tmp_path: Path, options: list[str], code: int, step: str, said: str
) -> None:
    if "/nowhere" in options:
        command = command[:-4]
    if step == "sweep":
        (tmp_path / "manage").write_text("not.a.token")
    ended_with, report = await ended(await start([*command, *options]))

    assert (ended_with, report["failed_step"]) == (code, step)
    assert said in report["error"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--client-certificate-file", "one.pem"], "need each other"),
        (["--client-key-file", "one.key"], "need each other"),
        (
            ["--client-certificate-file", "one.pem", "--client-key-file", "other.key"],
            "belongs to the certificate",
        ),
        (["--server-ca-file", "empty.pem"], "--server-ca-file cannot be used"),
    ],
)
async def test_tls_files_that_are_no_good_are_named(
    *, command: list[str], authority: trustme.CA, tmp_path: Path, options: list[str], said: str
) -> None:
    for name in ("one", "other"):
        certificate = authority.issue_cert(f"{name}.example")
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        certificate.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    (tmp_path / "empty.pem").touch()
    given = [str(tmp_path / o) if "." in o else o for o in options]

    code, report = await ended(await start([*command, *given]))

    assert (code, report["failed_step"]) == (2, "start")
    assert said in report["error"]
