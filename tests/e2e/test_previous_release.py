"""The release before the newest migration, its real server and engine, on the newest schema."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from cli.startup import head
from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.processes import Processes, environment_of
from tests.support.receiver import Receiver

#: Settings that came after it; it would take them for misspelt.
_NEWER = ("METRICS_ADDRESS",)


@pytest.fixture
def previous(tmp_path: Path) -> Path:
    """The sources as they were before the newest migration came."""
    newest = f"migrations/versions/{head()}.py"
    came = _git("log", "-1", "--diff-filter=A", "--format=%H", "--", newest)
    if not came or not _git("rev-parse", "--verify", f"{came}^"):
        pytest.skip("the history of this clone does not go back to the previous release")
    archive, sources = tmp_path / "previous.tar", tmp_path / "previous"
    sources.mkdir()
    _git("archive", f"--output={archive}", f"{came}^")
    subprocess.run(["tar", "-xf", archive, "-C", sources], check=True)
    assert not (sources / newest).exists()
    return sources


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path, previous: Path
) -> AsyncIterator[Processes]:
    """Engines of the previous release, beside a server of this one."""
    environment = environment_of(database_url, ca_file, platform.key.public_key_file)
    known = {n: v for n, v in environment.items() if not n.endswith(_NEWER)}
    sources = {"PYTHONPATH": f"{previous}:{previous / 'generated'}"}
    processes = Processes({**known, **sources})
    yield processes
    await processes.kill_all()


@pytest.mark.slow
async def test_previous_release_works_on_newest_schema(
    processes: Processes, platform: Platform, receiver: Receiver
) -> None:
    _, address = await processes.server()
    engine = await processes.engine()
    async with grpc.aio.insecure_channel(address) as channel:
        old = Platform(address, platform.key, platform.settings, channel)
        # Each half of the way with each release.
        await old.register(receiver.url, "m_old")
        await platform.register(receiver.url, "m_new")
        ids = {
            (await release.publish(merchant_id=merchant, idempotency_key="k")).event.id
            for release, merchant in ((old, "m_new"), (platform, "m_old"))
        }
        again = await old.publish(merchant_id="m_new", idempotency_key="k")
        assert again.duplicate
        webhooks = await receiver.wait_for(2)
        assert {webhook.message_id for webhook in webhooks} == ids
    assert engine.lives


def _git(*arguments: str) -> str:
    """What git prints; nothing when it fails, or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)  # noqa: PLW1510
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
