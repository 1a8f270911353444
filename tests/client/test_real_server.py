"""The publisher with the real server."""

import time
from collections.abc import Callable
from typing import Any

from postrider.v1.event_pb2 import EventInput
from postrider_client import PostriderClient, Token
from tests.support.platform import Platform


def client_of(platform: Platform) -> PostriderClient:
    async def fetch_token() -> Token:
        return Token(platform.token("events:publish"), expires_at=time.time() + 500)

    return PostriderClient(platform.address, fetch_token, tls=False)


async def test_publisher_stores_each_event_once(
    start_platform: Callable[..., Any], pool: Any, logged: list[Any]
) -> None:
    async with start_platform() as platform, client_of(platform) as client:
        async with client.publisher(linger_ms=2, max_batch=50) as publisher:
            futures = [
                await publisher.publish(
                    EventInput(
                        merchant_id="m_1", type="payment.succeeded", payload_text=f"{number}"
                    )
                )
                for number in range(1000)
            ]
        ids = {(await future).id for future in futures}

    assert len(ids) == 1000
    assert await pool.fetchval("SELECT count(*) FROM events") == 1000
    # Logged at the end of the stream.
    methods = {entry["method"] for entry in logged if entry["event"] == "rpc"}
    assert methods == {"/postrider.v1.EventService/StreamEvents"}
