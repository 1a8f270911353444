"""The README's Python, run as it stands there."""

import re
from typing import Any

from standardwebhooks.webhooks import Webhook

from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.receiver import Receiver

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def snippet(text: str) -> dict[str, Any]:
    """The names that the one snippet which holds `text` defines."""
    [code] = [code for code in SNIPPETS if text in code]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - this is what the test is for
    return names


async def test_readme_publishes_and_verifies_what_arrives(
    platform: Platform, receiver: Receiver
) -> None:
    publish = snippet("async def publish")["publish"]
    is_genuine = snippet("def is_genuine")["is_genuine"]
    created = await platform.register(receiver.url, merchant_id="demo-merchant")

    async with platform.engine():
        event_id = await publish(platform.address, platform.token("events:publish"))
        [received] = await receiver.wait_for(1)

    assert received.message_id == event_id
    assert is_genuine(created.secret, received.headers, received.body)
    assert not is_genuine(created.secret, received.headers, received.body + b" ")
    two = f"{received.headers['X-Webhook-Signature']},v1={'0' * 64}"
    assert is_genuine(
        created.secret, {**received.headers, "X-Webhook-Signature": two}, received.body
    )
    verifier = Webhook(created.standard_webhooks_secret)
    assert verifier.verify(received.body, received.headers) == {"amount": 4200}


def test_readme_map_names_every_folder_of_the_tree() -> None:
    root = ROOT
    folders = {path.name for path in root.iterdir() if (path / "__init__.py").exists()}
    folders |= {"protos", "generated", "docs", "tools"}

    assert [name for name in sorted(folders) if f"`{name}/" not in README] == []
