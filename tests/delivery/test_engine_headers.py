"""Custom headers of a webhook config, and the age of connections to its receiver."""

from dataclasses import replace
from typing import Any

import pytest

from core.ids import parse_id
from tests.support.platform import Platform
from tests.support.queue_state import until_queued
from tests.support.receiver import Receiver


async def test_custom_headers_are_sent_and_follow_updates(
    platform: Platform, receiver: Receiver
) -> None:
    headers = {"Authorization": "Bearer swordfish", "X-Tenant": "a b"}
    created = await platform.register(receiver.url, headers=headers)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
        await platform.update(created.webhook_config.id, headers={"X-Tenant": "c"})
        await platform.publish()
        await receiver.wait_for(2)

    ping, first, second = receiver.requests
    assert ping.is_ping
    for request in (ping, first):
        assert headers.items() <= request.headers.items()
    assert second.headers["X-Tenant"] == "c"
    assert "Authorization" not in second.headers
    assert second.headers["Content-Type"] == "application/json"


async def test_stored_header_injection_fails_only_its_own_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    healthy = await platform.register(receiver.url)
    # The API refuses such a header, so it is written to the database.
    await pool.execute(
        """UPDATE webhook_configs SET headers = $1, version = version + 1 WHERE id <> $2""",
        '{"X-Tenant": "a\\r\\nX-Admin: 1"}',
        parse_id("wh", healthy.webhook_config.id),
    )
    async with platform.engine(max_fault_retries=0):
        await platform.publish()
        await receiver.wait_for(1)
        await until_queued(pool, {})
    rows = await pool.fetch("SELECT outcome, status_code, detail FROM attempts ORDER BY outcome")
    assert [tuple(row) for row in rows] == [
        ("internal_error", None, "Postrider could not make the request"),
        ("succeeded", 200, "200 OK"),
    ]
    assert len(receiver.webhooks) == 1


@pytest.mark.parametrize(("seconds", "dialled"), [(1e-6, [True, True]), (300.0, [True, False])])
async def test_connection_is_reused_up_to_its_maximum_age(
    platform: Platform, receiver: Receiver, pool: Any, seconds: float, dialled: list[bool]
) -> None:
    egress = platform.settings.egress.model_copy(update={"receiver_connection_seconds": seconds})
    platform.settings = replace(platform.settings, egress=egress)
    await platform.register(receiver.url)
    async with platform.engine():
        for count in (1, 2):
            await platform.publish()
            await receiver.wait_for(count)
            await until_queued(pool, {})
    rows = await pool.fetch("SELECT connect_us FROM attempts ORDER BY delivery_id")
    assert [row["connect_us"] is not None for row in rows] == dialled
