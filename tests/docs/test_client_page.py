"""The Python of docs/guide/client.md, run as written against a real server."""

import re
from collections.abc import Callable
from typing import Any

from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_ED25519
from postrider.v1.webhook_config_service_pb2 import RotateSecretRequest
from postrider_client import PostriderClient, Token
from tests.support.paths import ROOT
from tests.support.platform import Platform
from tests.support.receiver import Receiver

PAGE = (ROOT / "docs/guide/client.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def page(**given: Any) -> dict[str, Any]:
    """Run the snippets of the page in order and return the names that they define."""
    names: dict[str, Any] = {"__name__": "client_page", **given}
    for code in SNIPPETS:
        exec(compile(code, "docs/guide/client.md", "exec"), names)  # noqa: S102 - runs code of the page
    return names


async def test_client_page_publishes_and_verifies(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    names = page(issue_token=lambda: platform.token("events:publish"))
    created = await platform.register(receiver.url, merchant_id="m_1")

    async with platform.engine():
        event_id = await names["publish_one"](platform.address)
        [received] = await receiver.wait_for(1)
    webhook = names["receive"](created.secret, received.headers, received.body)
    assert webhook.id == event_id
    assert webhook.event_type == "payment.succeeded"
    assert names["receive"](created.secret, received.headers, received.body + b" ") is None

    async with PostriderClient(platform.address, names["fetch_token"], tls=False) as client:
        payments = [f"many_{number}" for number in range(1200)]
        ids = await names["publish_many"](client, payments)
        assert len(set(ids)) == 1200
        assert await names["publish_many"](client, payments) == ids
    assert await pool.fetchval("SELECT count(*) FROM events") == 1201


async def test_client_page_verifies_key_pair_signatures(
    platform: Platform, receiver: Receiver
) -> None:
    verify = page(issue_token=str)["receive_signed_by_key_pair"]
    created = await platform.register(receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
    [ping] = receiver.requests
    assert verify(created.webhook_config, ping.headers, ping.body).id == ping.message_id
    assert verify(created.webhook_config, ping.headers, ping.body + b" ") is None

    rotated = await platform.webhooks.RotateSecret(
        RotateSecretRequest(id=created.webhook_config.id), metadata=platform.merchant()
    )
    assert verify(rotated.webhook_config, ping.headers, ping.body).id == ping.message_id


async def test_publisher_loses_no_event_in_a_server_outage(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    async with start_platform() as first:
        token = first.token("events:publish")

        async def source() -> Token:
            return Token(token)

        client = PostriderClient(first.address, source, tls=False)
        publisher = client.publisher(linger_ms=1, max_batch=20)
        event = page(issue_token=str)["EventInput"](
            merchant_id="m_1", type="payment.succeeded", payload=b"{}"
        )
        await (await publisher.publish(event))
        futures = [await publisher.publish(event) for _ in range(300)]
    async with start_platform(listen_address=first.address):
        await publisher.close()
        await client.close()
    assert len({(await future).id for future in futures}) == 300
    assert await pool.fetchval("SELECT count(*) FROM events") == 301
