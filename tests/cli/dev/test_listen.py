"""`postrider listen` as a developer uses it: a real process that a real engine delivers to."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from time import time
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cli.authority import ensure_authority
from cli.dev.listen_receiver import Answers, Listener, ListenerKeys
from cli.receiver import accepting
from core.signing import new_secret, signature_headers
from tests.support.platform import Platform, running_platform
from tests.support.processes import POSTRIDER


@pytest.fixture
async def trusting(database_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    """A platform that trusts the authority of this test's data directory, and delivers."""
    authority = ensure_authority(tmp_path / "data" / "receiver-ca.pem")
    async with (
        running_platform(database_url, authority.ca_file, tmp_path) as platform,
        platform.engine(retry_schedule_seconds=(0.1,)),
    ):
        yield platform


class Listening:
    """A process that listens; `next()` is the next object it prints."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, welcome: str):
        self.process = process
        self.url = url
        self.welcome = welcome

    async def next(self) -> dict[str, Any]:
        assert self.process.stdout
        async with asyncio.timeout(20):
            shown: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return shown

    async def ended(self) -> tuple[int | None, str]:
        async with asyncio.timeout(20):
            _, told = await self.process.communicate()
        return self.process.returncode, told.decode()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`async with start("--count", "1") as listening`, with its data below this test's."""

    @asynccontextmanager
    async def started(*options: str) -> AsyncIterator[Listening]:
        process = await asyncio.create_subprocess_exec(
            POSTRIDER,
            *("listen", "--json", "--port", "0", *options),
            env={"PATH": os.environ["PATH"], "WEBHOOK_DATA_DIR": str(tmp_path / "data")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr
        welcome = ""
        try:
            while not (found := re.search(r"Listening on (\S+)", welcome)):
                line = await process.stderr.readline()
                assert line, welcome
                welcome += line.decode()
            while "no secret" not in line.decode().lower() and line.strip():
                line = await process.stderr.readline()
            yield Listening(process, found[1], welcome)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    return started


async def test_webhooks_are_verified_shown_and_counted(
    trusting: Platform, start: Callable[..., Any], tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    async with start("--secret-file", str(secrets), "--fail-first", "1") as listening:
        created = await trusting.register(listening.url)
        assert (await listening.next())["type"] == "webhook.ping"
        # The secret is known only now, and the file is read again.
        secrets.write_text(created.standard_webhooks_secret)
        event = (await trusting.publish('{"amount": 42}')).event.id
        tries = [await listening.next() for _ in range(2)]
        secrets.write_text(new_secret())
        await trusting.publish()
        stranger = await listening.next()
        listening.process.send_signal(signal.SIGINT)
        code, told = await listening.ended()

    assert [(t["id"], t["attempt"], t["status"], t["valid"]) for t in tries] == [
        (event, "1", 503, True),
        (event, "2", 200, True),
    ]
    assert tries[0]["payload"] == {"amount": 42}
    assert [s["header"] for s in tries[0]["signatures"]] == [
        "X-Webhook-Signature",
        "webhook-signature",
    ]
    assert (stranger["valid"], stranger["status"]) == (False, 401)
    assert "another webhook config's secret" in stranger["reason"]
    assert code == 0
    assert "1 of them invalid" in told


async def test_it_is_forwarded_as_it_came_and_answered_alike(
    trusting: Platform, start: Callable[..., Any]
) -> None:
    arrived: list[tuple[str, bytes]] = []

    async def application(request: web.Request) -> web.Response:
        arrived.append((request.headers["webhook-signature"], await request.read()))
        return web.Response(status=202, text="thanks")

    async with (
        accepting(application, "127.0.0.1", 0, None, "") as port,
        start("--forward-to", f"http://127.0.0.1:{port}/x", "--count", "1") as listening,
    ):
        await trusting.register(listening.url)
        await listening.next()
        await trusting.publish('{"a":  1}')
        shown = await listening.next()
        code, _ = await listening.ended()

    assert [body for _, body in arrived][1] == b'{"a":  1}'
    assert (shown["status"], shown["valid"], code) == (202, None, 0)


def listen(*options: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [POSTRIDER, "listen", *options],
        env={"PATH": os.environ["PATH"], "WEBHOOK_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_it_cannot_start_with_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = listen("--port", str(port), tmp_path=tmp_path)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "choose another with --port" in done.stderr

    done = listen("--secret", "whsk_AAAA", tmp_path=tmp_path)
    assert done.returncode == 2
    assert "take the whpk_ key" in done.stderr
    assert "AAAA" not in done.stderr


async def test_a_duplicate_is_marked_and_a_hostile_one_changes_nothing() -> None:
    secret, written = new_secret(), list[str]()
    keys = ListenerKeys([secret], None)
    listener = Listener(keys, Answers(), None, written.append, as_json=False, count=None)
    body = b'{"note": "\xc2\x9b31m"}'
    good = signature_headers([secret], "evt_1", int(time()), body)
    async with (
        accepting(listener.handle, "127.0.0.1", 0, None, "") as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}/") as session,
    ):
        forged = {**good, "webhook-signature": "v1,AAAA", "X-Webhook-Event": "a\u202eb"}
        for headers in (forged, good, good):
            await session.post("/", data=body, headers=headers)
        large = await session.post("/", data=BytesIO(bytes(2**20 + 1)))

    assert large.status == 413
    assert ["DUPLICATE" in line for line in written].count(True) == 1
    assert listener.summary().startswith("3 webhooks, 1 of them invalid, 1 duplicates")
    assert all(c.isprintable() or c == "\x1b" for line in written for c in line)
    assert not any("\x9b" in line or "\u202e" in line for line in written)
