"""The Python of README.md, docs/guide/publish.md and docs/guide/receive.md, run as written."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.doc_pages import answer, as_written, prepared, section
from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.receiver import Receiver

README = (ROOT / "README.md").read_text()


def names_of(page: str) -> dict[str, Any]:
    """Run the Python snippets of a page in order and return the names that they define."""
    names: dict[str, Any] = {"__name__": "page"}
    text = (ROOT / page).read_text()
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, page, "exec"), names)  # noqa: S102 - runs what a reader would copy
    return names


@pytest.mark.parametrize(
    ("publish_page", "verify_page"),
    [("README.md", "README.md"), ("docs/guide/publish.md", "docs/guide/receive.md")],
)
async def test_page_publishes_and_verifies(
    publish_page: str, verify_page: str, platform: Platform, receiver: Receiver
) -> None:
    publish, verify = names_of(publish_page)["publish"], names_of(verify_page)
    created = await platform.register(receiver.url, merchant_id="demo-merchant")

    async with platform.engine():
        event_id = await publish(platform.address, platform.token("events:publish"))
        [received] = await receiver.wait_for(1)

    headers, body = received.headers, received.body
    assert received.message_id == event_id
    assert verify["is_genuine"](created.secret, headers, body)
    assert not verify["is_genuine"](created.secret, headers, body + b" ")
    two = {"X-Webhook-Signature": f"{headers['X-Webhook-Signature']},v1={'0' * 64}"}
    assert verify["is_genuine"](created.secret, {**headers, **two}, body)
    if "verified" in verify:
        assert verify["verified"](created.standard_webhooks_secret, headers, body) == {
            "amount": 4200
        }


async def test_publish_page_runs_in_a_shell(
    start_platform: Callable[..., Any], tmp_path: Path
) -> None:
    page = "docs/guide/publish.md"
    lines = [*section(page, "From a shell"), *section(page, "Event types and schemas")]
    environment = await asyncio.to_thread(prepared, "ADDRESS=127.0.0.1:50051\n", tmp_path)
    async with start_platform(reflection=True) as platform:
        answers = []
        for line in lines:
            there = line.replace("127.0.0.1:50051", platform.address).replace(".venv/bin/", "")
            answers.append(await answer(as_written(there, environment), environment))

    published, listed, updated = answers
    assert '"merchantId": "demo-merchant"' in published
    assert listed == "{}"
    assert '"enforceSchema": true' in updated


def test_readme_names_folders_in_at_most_150_lines() -> None:
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    folders |= {"protos", "generated", "docs", "tools"}

    assert [name for name in sorted(folders) if f"`{name}/" not in README] == []
    assert len(README.splitlines()) <= 150
